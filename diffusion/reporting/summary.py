"""Summaries: JSON files of finite numbers, with the time, the versions and the devices behind them."""

import contextlib
import json
import math
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from diffusion import __version__
from diffusion.runtime import files

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def write_json(path: Path, summary: dict[str, Any]) -> None:
    """Writes a summary, completely or not at all.

    Raises:
        ValueError: a number is NaN or Inf, at any depth; the message names it.
    """
    # JSON has no NaN. Python would write one, but other programs would refuse the file.
    files.write_text(path, json.dumps(checked_finite(_plain(summary)), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Reads a summary. Returns None if there is none, or if it is damaged."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _plain(value: Any) -> Any:
    """Returns the value with arrays as lists and their numbers as Python's."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def checked_finite(numbers: dict[str, Any]) -> dict[str, Any]:
    """Returns the numbers; raises a ValueError that names the first NaN or Inf, such as runs[2].test_bpd."""
    for name, value in numbers.items():
        _check_finite(name, value)
    return numbers


def _check_finite(name: str, value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_finite(f"{name}.{key}", item)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_finite(f"{name}[{i}]", item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}, not a finite number")


class Stopwatch:
    """Measures the total time of a run that may be stopped and resumed; a context manager around one leg.

    Args:
        path: the file that stores the seconds between legs.

    Raises:
        ValueError: the file is damaged.
    """

    SAVE_SECONDS = 10  # a killed leg loses about this much at most

    def __init__(self, path: Path):
        self._path = path
        self._begun = self._saved = time.monotonic()
        try:
            self._before = json.loads(path.read_text())["seconds"] if path.exists() else 0.0
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged; delete it, and summary.json counts seconds from now on") from error

    def seconds(self) -> float:
        """Returns the time of the earlier legs plus this one so far."""
        return self._before + time.monotonic() - self._begun

    def tick(self) -> None:
        """Saves the seconds if the last save is SAVE_SECONDS old. Call it often, because a leg may be killed."""
        if time.monotonic() - self._saved >= self.SAVE_SECONDS:
            self._save()

    def _save(self) -> None:
        write_json(self._path, {"seconds": self.seconds()})
        self._saved = time.monotonic()

    def __enter__(self) -> "Stopwatch":
        return self

    def __exit__(self, *exception) -> None:
        with contextlib.suppress(OSError):  # a full disk has been reported already
            self._save()


def versions() -> dict[str, str]:
    """Returns the versions of Python, this project and the packages that the numbers depend on."""
    packages = {name: metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "diffusion": __version__} | packages


def device_name() -> str:
    """Names all devices, such as "NVIDIA H200 ×1"."""
    devices = jax.devices()
    return f"{devices[0].device_kind} ×{len(devices)}"
