"""Writes and reads metrics.jsonl, the source of every curve, and passes its rows to the `loggers`."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, SupportsFloat

import numpy as np
from jaxtyping import UInt8

from diffusion.reporting.summary import checked_finite
from diffusion.runtime import files

Picture = UInt8[np.ndarray, "h w c"]


def _ignore(*_: Any) -> None:
    """For a logger without pictures, or with nothing to close."""


class Logger(NamedTuple):
    """The functions that receive the rows of metrics.jsonl as they are written.

    Attributes:
        write: called with a step and its row.
        images: called with a step, a name and a picture.
        close: called once, when training ends or is stopped.
    """

    write: Callable[[int, dict[str, float]], None]
    images: Callable[[int, str, Picture], None] = _ignore
    close: Callable[[], None] = _ignore


NOBODY = Logger(_ignore)


class MetricsLog:
    """Writes metrics.jsonl, one JSON object per step, and passes each row on.

    A run that resumes opens the log at its step. The rows after that step are dropped, because the run will write them
    again, and so is the half-written last row of a killed run. If a step's row is written before its checkpoint, no
    step is missing and none appears twice.

    Args:
        workdir: the directory of metrics.jsonl.
        step: the step that the run starts from.
        after_row: called after each row.
        logger: receives the rows and the pictures.
    """

    def __init__(
        self,
        workdir: str | Path,
        step: int = 0,
        after_row: Callable[[], None] | None = None,
        logger: Logger = NOBODY,
    ):
        self._after_row, self._logger = after_row, logger
        path = Path(workdir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(workdir) if row["step"] <= step]
        # It may be below `step`: that step has no row if a signal stopped its measurements.
        self.last_step = kept[-1]["step"] if kept else 0
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._rows = path.open("a")

    def write(self, step: int, **scalars: SupportsFloat) -> None:
        """Appends one row, which is on disk when this returns.

        Raises:
            ValueError: a number is NaN or Inf, or the step is not above the last one.
            OSError: the disk is full.
        """
        if step <= self.last_step:
            raise ValueError(f"the metrics of step {step} cannot follow those of step {self.last_step}")
        self.last_step = step
        row = checked_finite({name: float(value) for name, value in scalars.items()})
        try:
            self._rows.write(json.dumps({"step": step} | row) + "\n")
            self._rows.flush()
            os.fsync(self._rows.fileno())  # or the step's checkpoint could survive a power failure without this row
        except OSError as error:
            raise OSError(f"the metrics of step {step} could not be written to {self._rows.name} ({error})") from error
        self._logger.write(step, row)
        if self._after_row is not None:
            self._after_row()

    def images(self, step: int, name: str, picture: Picture) -> None:
        """Passes a picture to the logger."""
        self._logger.images(step, name, picture)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # `write` has raised its error already
            self._rows.close()
        self._logger.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """Returns the rows of metrics.jsonl, oldest first; [] if there are none yet.

    Raises:
        ValueError: a row is damaged. (A killed run's half-written last row is skipped.)
    """
    path = Path(workdir) / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:  # also for bytes that are not text
            if number < len(lines):
                raise ValueError(f"line {number} of {path} is damaged: {line[:60]!r}") from None
    return rows
