"""Which page a directory gets, and how it is written."""

import sys
from pathlib import Path

from diffusion.reporting.page import layout, run, sweep
from diffusion.reporting.page.contents import Contents
from diffusion.runtime import files

NAME = "report.html"


def write(directory: Path) -> Path:
    """Makes the page of the run, or of the sweep, in a directory; returns where it is.

    Raises:
        FileNotFoundError: neither is there.
        OSError: the page could not be written.
    """
    contents = Contents(directory)
    if contents.has(run.CONFIG):
        made = run.page(contents)
    elif sweep.runs(contents) or contents.has(sweep.TABLE):
        for name in sweep.runs(contents):
            if not contents.has(f"{name}/{NAME}"):
                write(directory / name)
        made = sweep.page(contents, NAME)
    else:
        raise FileNotFoundError(
            f"{directory} holds no run (no {run.CONFIG}) and no sweep (no folders with one, no {sweep.TABLE})"
        )
    files.write_text(directory / NAME, layout.render(made))
    return directory / NAME


def refresh(directory: Path) -> None:
    """Makes the page at the end of a program whose results are already saved: a failure is a warning, no error.

    The page only shows what is in other files, so it must not turn a finished run into a failed one.
    """
    try:
        write(directory)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        command = f"python -m diffusion.reporting.page {directory}"
        print(f"warning: {directory / NAME} was not made ({reason}); all else is saved; try {command}", file=sys.stderr)
