"""metrics.jsonl, the source of truth for every curve, and the same numbers in TensorBoard."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
from jaxtyping import UInt8
from tensorboardX import SummaryWriter

from diffusion.reporting.summary import checked_finite
from diffusion.runtime import files


class MetricsLog:
    """Writes metrics.jsonl, one JSON object per step, and the same numbers to TensorBoard.

    A run that resumes opens the log at its step. The rows after that step are dropped, because the run will write them
    again, and so is the half-written last row of a killed run. If a step's row is written before its checkpoint, no
    step is missing and none appears twice.

    Args:
        workdir: gets metrics.jsonl (the source of truth) and tensorboard/.
        step: the step that the run starts from.
        after_row: called after each row.
    """

    def __init__(self, workdir: str | Path, step: int = 0, after_row: Callable[[], None] | None = None):
        self._last_step, self._after_row = step, after_row
        path = Path(workdir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(workdir) if row["step"] <= step]
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._rows = path.open("a")
        # Its thread ends when the disk is full; a short queue would then block the run forever.
        self._tensorboard = SummaryWriter(str(path.parent / "tensorboard"), max_queue=10_000, purge_step=step + 1)

    def write(self, step: int, **scalars: SupportsFloat) -> None:
        """Appends one row; it is in the file when this returns.

        Raises:
            ValueError: a number is NaN or Inf, or the step is not beyond the last one.
            OSError: the disk is full.
        """
        if step <= self._last_step:
            raise ValueError(f"metrics of step {step} come after those of step {self._last_step}")
        self._last_step = step
        row = checked_finite({name: float(value) for name, value in scalars.items()})
        try:
            self._rows.write(json.dumps({"step": step} | row) + "\n")
            self._rows.flush()
            os.fsync(self._rows.fileno())  # before the step's checkpoint, which could outlive a power failure
        except OSError as error:
            raise OSError(f"the metrics of step {step} could not be written to {self._rows.name} ({error})") from error
        for name, value in row.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._after_row is not None:
            self._after_row()

    def images(self, step: int, name: str, grid: UInt8[np.ndarray, "h w c"]) -> None:
        """Shows a picture in TensorBoard."""
        self._tensorboard.add_image(name, grid, step, dataformats="HWC")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # `write` has raised its error already
            self._rows.close()
            self._tensorboard.close()

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
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ValueError(f"line {number} of {path} is damaged: {line[:60]!r}") from None
    return rows
