"""What a person sees: progress, metrics, pictures and the summary of a run."""

import contextlib
import json
import math
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, SupportsFloat

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tensorboardX import SummaryWriter
from tqdm import tqdm

from diffusion import __version__, files

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class MetricsLog:
    """metrics.jsonl, one JSON object per step, and the same in TensorBoard.

    Opening the log at the step a run resumes from drops the rows beyond it, which the run will write again;
    what a killed run did not finish writing is dropped too. So no step is missing and none appears twice,
    provided that a step's row is written before its checkpoint.

    Args:
        workdir: gets metrics.jsonl (the source of truth) and tensorboard/.
        step: the step that the run starts from.
    """

    def __init__(self, workdir: str | Path, step: int = 0):
        self._last_step = step
        path = Path(workdir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(workdir) if row["step"] <= step]
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._rows = path.open("a")
        # Its thread ends where the disk is full; a short queue would then block the run for ever.
        self._tensorboard = SummaryWriter(str(path.parent / "tensorboard"), max_queue=10_000, purge_step=step + 1)

    def write(self, step: int, **scalars: SupportsFloat) -> None:
        """Appends one row; it is in the file when this returns.

        Raises:
            ValueError: a number is not finite, or the step is not beyond the last one.
            OSError: the disk is full.
        """
        if step <= self._last_step:
            raise ValueError(f"metrics of step {step} come after those of step {self._last_step}")
        self._last_step = step
        row = _finite({name: float(value) for name, value in scalars.items()})
        try:
            self._rows.write(json.dumps({"step": step} | row) + "\n")
            self._rows.flush()
            os.fsync(self._rows.fileno())  # before the step's checkpoint, which could outlive a power failure
        except OSError as error:
            raise OSError(f"the metrics of step {step} could not be written to {self._rows.name} ({error})") from error
        for name, value in row.items():
            self._tensorboard.add_scalar(name, value, step)

    def images(self, step: int, name: str, grid: UInt8[np.ndarray, "h w c"]) -> None:
        """Shows a picture in TensorBoard."""
        self._tensorboard.add_image(name, grid, step, dataformats="HWC")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written was said by `write`
            self._rows.close()
            self._tensorboard.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, oldest first; [] if there are none yet.

    Raises:
        ValueError: a row is damaged. (A last one that a killed run left half written is passed over.)
    """
    path = Path(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ValueError(f"line {number} of {path} is damaged: {line[:60]!r}") from None
    return rows


def write_json(path: Path, summary: dict[str, Any]) -> None:
    """Writes a summary, whole or not at all.

    Raises:
        ValueError: a number is not finite; the message names it.
    """
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in summary.items()}
    files.write_text(path, json.dumps(_finite(plain), indent=2) + "\n")


def _finite(numbers: dict[str, Any]) -> dict[str, Any]:
    for name, value in numbers.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}, not a finite number")
    return numbers


def versions() -> dict[str, str]:
    """Of Python, this project and the packages that the numbers depend on."""
    packages = {name: metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "diffusion": __version__} | packages


def device_name() -> str:
    """All devices in words, such as "NVIDIA H200 ×1"."""
    devices = jax.devices()
    return f"{devices[0].device_kind} ×{len(devices)}"


class Progress(tqdm):
    """A progress bar with the time left, of the first process; a line now and then where the output is no terminal.

    Args:
        total: how many units the whole job has.
        initial: how many of them were done before (a resumed run).
        desc: what is going on: "train".
        unit: what is counted: "step".
    """

    def __init__(self, total: int, initial: int = 0, desc: str = "", unit: str = "step"):
        terminal = {"dynamic_ncols": True}
        log_file = {
            "mininterval": 10.0,
            "maxinterval": 10.0,
            "bar_format": "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]\n",
        }
        style = terminal if sys.stderr.isatty() else log_file
        super().__init__(total=total, initial=initial, desc=desc, unit=unit, disable=jax.process_index() > 0, **style)

    def advance(self, count: int, **numbers: SupportsFloat) -> None:
        """Moves on by `count` units and shows the numbers (loss, images_per_s) at the next refresh."""
        self.set_postfix({name: float(value) for name, value in numbers.items()}, refresh=False)
        self.update(count)


def image_grid(
    images: UInt8[np.ndarray, "n h w c"], num_levels: int = 256, columns: int | None = None
) -> UInt8[np.ndarray, "grid_h grid_w c"]:
    """Lays images out row by row, as square as possible unless `columns` is given.

    Grey levels 0…num_levels-1 are stretched to 0…255, and small images enlarged by the whole factor that fits
    into 48 pixels, so that a person can see them.
    """
    n, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    rows = math.ceil(n / columns)
    factor = max(1, 48 // max(height, width))
    margin = 2
    visible = np.round(images * (255 / (num_levels - 1))).astype(np.uint8)
    visible = visible.repeat(factor, axis=1).repeat(factor, axis=2)
    cell_height, cell_width = height * factor + margin, width * factor + margin
    grid = np.full((rows * cell_height + margin, columns * cell_width + margin, channels), 128, np.uint8)
    for i, image in enumerate(visible):
        top, left = margin + i // columns * cell_height, margin + i % columns * cell_width
        grid[top : top + height * factor, left : left + width * factor] = image
    return grid


def film(films: UInt8[np.ndarray, "n f h w c"], num_levels: int = 256) -> UInt8[np.ndarray, "grid_h grid_w c"]:
    """A row per sample: x̂_0 from the first step on the left to the finished image on the right."""
    return image_grid(films.reshape(-1, *films.shape[2:]), num_levels, columns=films.shape[1])


def save_png(path: str | Path, picture: UInt8[np.ndarray, "h w c"]) -> None:
    """Writes a picture of one (grey) or three (RGB) channels, whole or not at all."""
    with files.replacing(Path(path)) as file:
        Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture).save(file, format="png")
