"""What lies in a directory, read for a page: a missing file is empty, and a damaged one becomes a line on the page."""

import io
import json
import lzma
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, UnidentifiedImageError

from diffusion.reporting.metrics_log import read_metrics

T = TypeVar("T")

MAX_TEXT_BYTES = 2**20  # of a JSON or text file
MAX_SAMPLE_BYTES = 2**25  # of samples.npz, which may be much larger, so many are read
# What a reader raises for bytes that are not what they should be.
DAMAGE = (
    *(ValueError, KeyError, TypeError, IndexError, EOFError, SyntaxError, RuntimeError, MemoryError, struct.error),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, UnidentifiedImageError, Image.DecompressionBombError),
)


class Samples(NamedTuple):
    """What was sampled last, or the beginning of it.

    Attributes:
        images: pixel values.
        labels: the class of each image, if the network takes labels.
        num_levels: how many pixel values there are.
        total: how many images there are in all.
    """

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, " n"] | None
    num_levels: int
    total: int


class Contents:
    """The files of a directory, each read when it is asked for.

    Attributes:
        directory: where they lie.
        problems: a line about each file that could not be read.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.problems: list[str] = []

    def has(self, name: str) -> bool:
        return (self.directory / name).exists()

    def matching(self, pattern: str) -> list[str]:
        """The names that fit a pattern, relative to the directory, sorted."""
        return sorted(str(path.relative_to(self.directory)) for path in self.directory.glob(pattern))

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file's object; {} without one."""
        return self._read(name, _parse_object, {})

    def text(self, name: str) -> str:
        """A text file; "" without one."""
        return self._read(name, _parse_text, "")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, oldest first; [] without any."""
        try:
            rows = read_metrics(self.directory)
            if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
                raise ValueError("not every row is an object with a step")
        except (*DAMAGE, OSError) as error:
            self._report("metrics.jsonl", error)
            return []
        return rows

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of an .npz file; {} without one."""
        return self._read(name, _parse_arrays, {})

    def picture(self, name: str) -> tuple[bytes, UInt8[np.ndarray, "h w c"]] | None:
        """A PNG file as it is, and its pixels: one channel (grey) or three."""
        return self._read(name, _parse_picture, None)

    def samples(self) -> Samples | None:
        """The first images of samples.npz; not all, because there may be a gigabyte of them."""
        path = self.directory / "samples.npz"
        try:
            return _read_samples(path) if path.exists() else None
        except (*DAMAGE, OSError) as error:
            self._report(path.name, error)
            return None

    def _read(self, name: str, parse: Callable[[bytes], T], missing: T) -> T:
        try:
            return parse((self.directory / name).read_bytes())
        except FileNotFoundError:
            return missing
        except (*DAMAGE, OSError) as error:
            self._report(name, error)
            return missing

    def _report(self, name: str, error: Exception) -> None:
        # Pillow, too, raises an OSError for a damaged file, but without an error number.
        is_damage = not isinstance(error, OSError) or error.errno is None
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        self.problems.append(f"{name} {'is damaged' if is_damage else 'could not be read'}: {reason}")


def _parse_text(data: bytes) -> str:
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"its {len(data):,} bytes are too many for a page")
    return data.decode()


def _parse_object(data: bytes) -> dict[str, Any]:
    value = json.loads(_parse_text(data))
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


def _parse_arrays(data: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(data)) as saved:
        return dict(saved)


def _parse_picture(data: bytes) -> tuple[bytes, UInt8[np.ndarray, "h w c"]]:
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        pixels = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    return data, pixels if pixels.ndim == 3 else pixels[:, :, None]


def _read_samples(path: Path) -> Samples:
    with zipfile.ZipFile(path) as archive, archive.open("images.npy") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("its images are in no format that numpy.savez writes")
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if len(shape) != 4 or is_fortran or dtype != np.uint8 or shape[3] not in (1, 3) or 0 in shape:
            raise ValueError(f"its images are {dtype} of shape {shape}, not uint8 [N, H, W, C] with 1 or 3 channels")
        size = int(np.prod(shape[1:]))
        count = max(1, min(shape[0], MAX_SAMPLE_BYTES // size))
        images = np.frombuffer(file.read(count * size), np.uint8).reshape(count, *shape[1:])
    with np.load(path) as saved:
        num_levels = int(saved["num_levels"])
        labels = saved["labels"] if "labels" in saved else None
    if num_levels < 2 or images.max() >= num_levels:
        raise ValueError(f"its images do not have {num_levels} pixel values")
    if labels is not None and (labels.shape != shape[:1] or labels.dtype.kind != "i"):
        raise ValueError(f"its labels are {labels.dtype} of shape {labels.shape}, not integers of shape ({shape[0]},)")
    return Samples(images, None if labels is None else labels[:count], num_levels, shape[0])
