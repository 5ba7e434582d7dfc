"""Summaries: JSON files of finite numbers, and what the numbers depend on."""

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
    # JSON has no NaN; Python would write one, which other programs refuse.
    files.write_text(path, json.dumps(checked_finite(_plain(summary)), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """A summary; None if there is none, or it is damaged."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _plain(value: Any) -> Any:
    """Returns the value with arrays as lists, and NumPy's and JAX's numbers as Python's."""
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
    """Measures the time of a run over all its legs; a context manager around one leg.

    Args:
        path: a file that keeps the seconds between the legs.

    Raises:
        ValueError: the file is damaged.
    """

    SAVE_SECONDS = 10  # a leg that is killed loses at most about this much

    def __init__(self, path: Path):
        self._path = path
        self._begun = self._saved = time.monotonic()
        try:
            self._before = json.loads(path.read_text())["seconds"] if path.exists() else 0.0
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged; delete it, and summary.json counts seconds from now on") from error

    def seconds(self) -> float:
        """Returns the time of the earlier legs and of this one so far."""
        return self._before + time.monotonic() - self._begun

    def tick(self) -> None:
        """Saves the seconds if they were not saved for a while; called often, because a leg may be killed."""
        if time.monotonic() - self._saved >= self.SAVE_SECONDS:
            self._save()

    def _save(self) -> None:
        write_json(self._path, {"seconds": self.seconds()})
        self._saved = time.monotonic()

    def __enter__(self) -> "Stopwatch":
        return self

    def __exit__(self, *exception) -> None:
        with contextlib.suppress(OSError):  # a full disk has had its error message
            self._save()


def versions() -> dict[str, str]:
    """Returns the versions of Python, this project and the packages that the numbers depend on."""
    packages = {name: metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "diffusion": __version__} | packages


def device_name() -> str:
    """Names all devices, such as "NVIDIA H200 ×1"."""
    devices = jax.devices()
    return f"{devices[0].device_kind} ×{len(devices)}"
