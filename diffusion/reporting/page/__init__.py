"""Makes report.html: a run or a sweep as one page, which needs no network, from the files in its directory.

The page shows the numbers in JSON files and the pictures. The same files make the same page, byte for byte.
"""

import sys
from pathlib import Path

from diffusion.reporting.page import run, sweep
from diffusion.reporting.page.contents import Contents
from diffusion.runtime import files

NAME = "report.html"


def write(directory: Path) -> Path:
    """Makes the page of the run or of the sweep in a directory, and returns its path.

    Raises:
        FileNotFoundError: the directory holds neither a run nor a sweep.
        OSError: the page could not be written.
    """
    contents = Contents(directory)
    if contents.has(run.CONFIG):
        html = run.page(contents)
    elif sweep.names(contents) or contents.has(sweep.TABLE):
        for name in sweep.names(contents):
            if not contents.has(f"{name}/{NAME}"):
                write(directory / name)
        html = sweep.page(contents, NAME)
    else:
        raise FileNotFoundError(
            f"{directory} holds no run (no {run.CONFIG}) and no sweep (no folders with one, no {sweep.TABLE})"
        )
    files.write_text(directory / NAME, html)
    return directory / NAME


def refresh(directory: Path) -> None:
    """Makes the page at the end of a program. A failure only prints a warning, because all results are saved."""
    try:
        write(directory)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        command = f"python -m diffusion.reporting.page {directory}"
        print(f"warning: {directory / NAME} was not made ({reason}); all else is saved; try {command}", file=sys.stderr)
