"""Summaries: JSON files of finite numbers, and what the numbers depend on."""

import json
import math
import platform
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
        ValueError: a number is NaN or Inf; the message names it.
    """
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in summary.items()}
    files.write_text(path, json.dumps(checked_finite(plain), indent=2) + "\n")


def checked_finite(numbers: dict[str, Any]) -> dict[str, Any]:
    """The same numbers; raises a ValueError that names the first one that is NaN or Inf."""
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
