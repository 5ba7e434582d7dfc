"""Checks of a stored checkpoint: whether it is complete, readable, unchanged, and fits the run."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from diffusion.runtime.digests import named_leaves


class DamagedCheckpoint(ValueError):
    """The stored checkpoint differs from the saved one."""


class OtherCheckpoint(ValueError):
    """The stored checkpoint belongs to another model or optimizer than the config's."""


def check_writable(directory: Path) -> None:
    """Raises a ValueError about a directory to which Orbax cannot write checkpoints that can be read again.

    It looks for its own files with the whole path as a pattern, where [ begins a set of characters, and takes a
    backslash for a separator.
    """
    if any(character in str(directory.absolute()) for character in "[\\"):
        raise ValueError(f"checkpoints cannot be kept in {directory.absolute()}: its path may have no [ and no \\")


def is_complete(path: Path) -> bool:
    """Whether every part of a checkpoint is there. Only reading it shows whether it is unchanged.

    Raises:
        OSError: the disk cannot be read.
    """
    try:
        json.loads((path / "metrics" / "metrics").read_bytes())  # Orbax reads the scores of all steps at once
        has_names = (path / "state" / "_METADATA").exists()  # Orbax can guess them where they are missing
        return has_names and all(any((path / item).iterdir()) for item in ("state", "digests"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return False
    except OSError as error:
        raise OSError(f"the checkpoint {path} cannot be read ({error.strerror or error})") from error


def check_readable(path: Path) -> None:
    """Raises an OSError if a file of a checkpoint cannot be read. Its contents are then unknown."""
    try:
        for file in sorted(path.rglob("*")):
            if file.is_file():
                with file.open("rb", buffering=0) as raw:
                    while raw.read(1 << 24):
                        pass
    except FileNotFoundError:
        return
    except OSError as error:
        raise OSError(
            f"the checkpoint {path} cannot be read ({error.strerror or error}: {error.filename or file}); nothing was "
            "changed; repair the disk or the connection to it and run the same command again"
        ) from error


def differing(found: dict[str, Any], stored: dict[str, Any]) -> str:
    """The name of the first entry that differs from the stored one; "" if none does."""
    for name in sorted(found["sha256"].keys() | stored["sha256"].keys()):
        if found["sha256"].get(name) != stored["sha256"].get(name):
            return name
    return next((name for name in ("step", "metrics") if found[name] != stored.get(name)), "")


def check_fit(saved: dict[str, np.ndarray], like: PyTree, path: Path) -> None:
    """Raises an OtherCheckpoint that names the first leaf in which the checkpoint and `like` differ."""
    wanted = dict(named_leaves(like))
    for name, leaf in wanted.items():
        if name not in saved:
            raise OtherCheckpoint(f"{name}, which the config wants, is not in the checkpoint {path}")
        found = saved[name]
        if found.shape != leaf.shape or found.dtype != leaf.dtype:
            raise OtherCheckpoint(
                f"{name} has shape {found.shape} and dtype {found.dtype} in the checkpoint {path}, "
                f"the config wants {leaf.shape} and {leaf.dtype}"
            )
    for name in sorted(saved.keys() - wanted.keys()):
        raise OtherCheckpoint(f"{name}, which is in the checkpoint {path}, has no place in the config's model")


class CompleteSteps:
    """Orbax's naming of step directories. It ignores directories without a complete checkpoint.

    Orbax takes any directory whose name is a number for a checkpoint, even an empty one. It would resume from it, and
    would count it among the last few when it deletes old ones.
    """

    def __init__(self):
        self._all = ocp.path.step.standard_name_format()

    def build_name(self, step: int) -> str:
        return self._all.build_name(step)

    def find_all(self, base_path) -> Iterator[ocp.path.step.Metadata]:
        return (found for found in self._all.find_all(base_path) if is_complete(Path(found.path)))

    def find_step(self, base_path, step: int) -> ocp.path.step.Metadata:
        return self._all.find_step(base_path, step)
