"""Reads the files of a directory for a page. A missing file counts as empty; a damaged one is named on the page."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from PIL import Image

from diffusion.reporting.metrics_log import read_metrics

T = TypeVar("T")

MAX_TEXT_BYTES = 2**20  # of a JSON or text file


class Picture(NamedTuple):
    """A PNG file and its size in pixels."""

    png: bytes
    width: int
    height: int


class Contents:
    """Reads the files of a directory on demand.

    Attributes:
        directory: the directory of the files.
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
        """The object in a JSON file; {} if the file is missing."""
        return self._read(name, _object, {})

    def text(self, name: str) -> str:
        """The text of a file; "" if the file is missing."""
        return self._read(name, _text, "")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, oldest first; [] if there are none."""
        return self._read("metrics.jsonl", _rows, [])

    def picture(self, name: str, max_bytes: int) -> Picture | None:
        """A PNG file, shrunk to half, a quarter, … of its width until it has at most max_bytes."""
        return self._read(name, lambda path: _shrunk(path, max_bytes), None)

    def _read(self, name: str, parse: Callable[[Path], T], missing: T) -> T:
        if not self.has(name):
            return missing
        try:
            return parse(self.directory / name)
        except Exception as error:  # a reader may raise anything for damaged bytes
            # Pillow raises an OSError for a damaged file, without an error number.
            is_damaged = not isinstance(error, OSError) or error.errno is None
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            self.problems.append(f"{name} {'is damaged' if is_damaged else 'could not be read'}: {reason}")
            return missing


def _text(path: Path) -> str:
    data = path.read_bytes()
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"it is too large for a page: {len(data):,} bytes")
    return data.decode()


def _object(path: Path) -> dict[str, Any]:
    value = json.loads(_text(path))
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = read_metrics(path.parent)
    if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
        raise ValueError("not every row is an object with a step")
    return rows


def _shrunk(path: Path, max_bytes: int) -> Picture:
    data = path.read_bytes()
    image = Image.open(io.BytesIO(data), formats=["PNG"])
    image.load()
    while len(data) > max_bytes:
        image = image.reduce(2)
        file = io.BytesIO()
        image.save(file, format="png")
        data = file.getvalue()
    return Picture(data, *image.size)
