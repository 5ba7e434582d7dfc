"""The first line that every program prints: its devices, its versions and the place of its results."""

import importlib.util
import os
import platform
import re
import socket
from pathlib import Path

import jax

from diffusion import __version__
from diffusion.reporting.summary import device_name

PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
# JAX's installation page, read on 2026-11-29.
DRIVERS = "CUDA 13 (the extra cuda) needs driver 580 or newer; with driver 525 or newer, pip install 'jax[cuda12]'"


def line(mode: str, results: str) -> str:
    """The first line.

    Args:
        results: the place of the results; "" if nothing is written.
    """
    count = jax.process_count()
    devices = device_name() + (f" in {count} processes" if count > 1 else "")
    versions = f"diffusion {__version__}, jax {jax.__version__}, Python {platform.python_version()}"
    where = f"; results: {results}" if results else ""
    return f"{mode} on {devices} ({socket.gethostname()}), {versions}{where}"


def missed_gpu(root: Path = Path("/")) -> str:
    """What to install if JAX uses the CPU although an NVIDIA GPU is present; "" if that is not so, or was requested.

    Args:
        root: the root of the file system.
    """
    told = jax.config.jax_platforms or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if told or jax.default_backend() != "cpu" or not list(root.glob("dev/nvidia[0-9]*")):
        return ""
    if not any(importlib.util.find_spec(plugin) for plugin in PLUGINS):
        cure = "jax has no CUDA plugin, so pip install -c constraints.txt -e '.[cuda]'"
    else:
        cure = "jax's CUDA plugin cannot use it"
    return f"this runs on the CPU although an NVIDIA GPU is here (driver {_driver(root)}): {cure}; {DRIVERS}"


def _driver(root: Path) -> str:
    """The version of the kernel driver, such as 580.65.06."""
    try:
        words = (root / "proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", words)
    return found[1] if found else "unknown"
