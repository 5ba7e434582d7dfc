"""A run and one of its checkpoints, as --fork and init_from name them: DIR, DIR@latest, DIR@best or DIR@STEP."""

import logging
from pathlib import Path
from typing import NamedTuple

from diffusion.runtime import files
from diffusion.runtime.checkpoint import Checkpoints


class NamedRun(NamedTuple):
    """The run's directory, and which checkpoint: "latest", "best" or a step."""

    directory: Path
    which: str

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints lie."""
        return self.directory / "checkpoints"

    def step(self, checkpoints: Checkpoints) -> int | None:
        """The step of the checkpoint; None for the newest sound one. Raises what `Checkpoints.best_step` does."""
        if self.which == "best":
            return checkpoints.best_step()
        return int(self.which) if self.which.isdecimal() else None


def warn_of_seen_images(name: str, new: int, old: int) -> None:
    """Warns where a run starts from one that has trained on some of its validation images.

    Args:
        name: what it starts from, as the user gave it.
        new, old: data.validation of both runs.
    """
    if new and new != old:
        words = "%s has seen validation images of data.validation=%s: val_loss is lower than of unseen ones"
        logging.warning(words, name, new)


def parse(text: str, key: str) -> NamedRun:
    """What `text` names.

    Args:
        key: the flag or the config key that it is the value of, for messages.

    Raises:
        ValueError: what comes after the @ is none of latest, best and a step.
    """
    directory, at, which = text.rpartition("@")
    if not at or files.expanded(text).exists():
        directory, which = text, "latest"
    if which not in ("latest", "best") and not which.isdecimal():
        raise ValueError(f"{key}={text!r}: after the @ comes latest, best or the step of a checkpoint")
    return NamedRun(files.expanded(directory), which)
