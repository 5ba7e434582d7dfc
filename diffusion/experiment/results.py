"""The directory for the results of a program that reads a run: the run itself, or the one that --output names."""

import errno
import tempfile
from pathlib import Path

from diffusion.experiment import export, workdir
from diffusion.runtime import processes

NOT_OURS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


def place(run: Path, output: str, folder: str) -> Path:
    """Returns `run`, or makes and returns the directory that --output names.

    Args:
        output: "" for the run itself.
        folder: the folder in it for the results, which need not exist.

    Raises:
        ValueError: `output` is not a directory, or holds another run or an export.
        OSError: the directory cannot be written to. For a run, the message names --output.
    """
    out = workdir.parse(output, "--output") if output else run
    processes.on_first(lambda: _make(out, output, run) if output else _check_ours(run, folder))
    return out


def _make(out: Path, output: str, run: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--output={output} is not a directory")
    is_other = not (out.exists() and run.exists() and out.samefile(run))
    if is_other and ((out / "config.json").exists() or export.is_export(out)):
        raise ValueError(f"--output={output} holds a run or an export of its own; take another directory")
    try:
        out.mkdir(parents=True, exist_ok=True)
        _probe(out)
    except OSError as error:
        raise OSError(f"--output={output} cannot be written to ({error.strerror}); take another directory") from error


def _check_ours(run: Path, folder: str) -> None:
    for directory in (run, run / folder):
        try:
            if directory.is_dir():
                _probe(directory)
        except OSError as error:
            if error.errno not in NOT_OURS:  # such as a full disk
                raise
            advice = "--output=DIR writes the results into another directory"
            raise OSError(f"{directory} cannot be written to ({error.strerror}); {advice}") from error


def _probe(directory: Path) -> None:
    """Raises the OSError of a directory in which no file can be made. Checking permissions alone misses some cases."""
    with tempfile.TemporaryFile(dir=directory):
        pass
