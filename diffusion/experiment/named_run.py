"""A run and one of its checkpoints, as --fork and init_from name them: DIR, DIR@latest, DIR@best or DIR@STEP."""

import logging
from pathlib import Path
from typing import NamedTuple

from diffusion.runtime import files
from diffusion.runtime.checkpoint import Checkpoints


class NamedRun(NamedTuple):
    """The directory of a run, and one of its checkpoints: "latest", "best" or a step."""

    directory: Path
    which: str

    @property
    def checkpoints(self) -> Path:
        """The directory of its checkpoints."""
        return self.directory / "checkpoints"

    def step(self, checkpoints: Checkpoints) -> int | None:
        """The step of the checkpoint; None for the newest sound one. Raises the errors of `Checkpoints.best_step`."""
        if self.which == "best":
            return checkpoints.best_step()
        return int(self.which) if self.which.isdecimal() else None


def warn_of_seen_images(name: str, new: int, old: int) -> None:
    """Warns if a run starts from one that has trained on some of its validation images.

    Args:
        name: the earlier run, as the user gave it.
        new, old: data.validation of the new and of the earlier run.
    """
    if new and new != old:
        words = "%s has seen validation images of data.validation=%s: val_loss is lower than on unseen images"
        logging.warning(words, name, new)


def parse(text: str, key: str) -> NamedRun:
    """Parses DIR, DIR@latest, DIR@best or DIR@STEP.

    Args:
        key: the flag or config key with this value, for messages.

    Raises:
        ValueError: the part after the @ is not latest, best or a step.
    """
    directory, at, which = text.rpartition("@")
    if not at or files.expanded(text).exists():
        directory, which = text, "latest"
    if which not in ("latest", "best") and not which.isdecimal():
        raise ValueError(f"{key}={text!r}: the part after @ must be latest, best or the step of a checkpoint")
    return NamedRun(files.expanded(directory), which)
