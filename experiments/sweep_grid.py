"""The cells of a sweep: every combination of the axes' values, each with the name of its folder."""

import itertools
import re
from typing import NamedTuple

from ml_collections import ConfigDict

from diffusion.experiment import config as config_lib
from diffusion.runtime.digests import short_sha256
from experiments.results import AXES

MAX_NAME = 255  # characters in a folder's name


class Cell(NamedTuple):
    """One run of a sweep: the name of its folder, its config file, and the keys it sets, written as for main.py."""

    name: str
    base: str
    overrides: dict[str, str]

    def arguments(self) -> list[str]:
        """The arguments for main.py."""
        return [f"--config={self.base}", *(f"--config.{key}={value}" for key, value in self.overrides.items())]

    def config(self) -> ConfigDict:
        """The config as main.py would resolve it.

        Raises:
            ValueError: the file cannot be read, a key does not exist, or a value is not allowed.
        """
        try:
            config = config_lib.from_file(self.base, self.overrides)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        config_lib.check(config)
        return config


def grid(base: str, axes: dict[str, list[str]], extra: dict[str, str]) -> list[Cell]:
    """One cell per combination of the axes' values, the last axis fastest. The overrides in `extra` apply to all.

    Args:
        base: the config file.
        axes: a list of values for every name in AXES, and for further config keys.
        extra: config key -> value.

    Raises:
        ValueError: an override sets an axis, or two cells would share a folder.
    """
    key_of = {axis: AXES.get(axis, axis) for axis in axes}
    for axis, key in key_of.items():
        if key in extra:
            flag = f"--{axis}=" if axis in AXES else f"--axis {key}="
            raise ValueError(f"--set {key}={extra[key]} is an axis of the grid; use {flag}{extra[key]}")
    # The seed varies fastest, whatever the other axes are.
    names = sorted(key_of, key=lambda axis: axis == "seed")
    cells: dict[str, Cell] = {}
    for values in itertools.product(*(dict.fromkeys(axes[axis]) for axis in names)):
        chosen = dict(zip(names, values, strict=True))
        name = folder_name(chosen)
        if name in cells:
            raise ValueError(f"two cells of the sweep would share the folder {name}; write equal values alike")
        cells[name] = Cell(name, base, {key_of[axis]: value for axis, value in chosen.items()} | extra)
    return list(cells.values())


def folder_name(values: dict[str, str]) -> str:
    """The values of the axes in characters that need no quoting in any file system or shell.

    A name that is too long for a file system ends with a digest of the values.

    {"schedule": "linear(beta_end=0.03)", "T": "50", "data.flip": "True"} -> "linear_beta_end_0.03-T50-data.flip_True".
    """
    said = {axis: "" for axis in AXES} | {"T": "T", "seed": "seed"}
    plain = {axis: re.sub(r"[^A-Za-z0-9_.+-]+", "_", value).strip("_") for axis, value in values.items()}
    name = "-".join(f"{said.get(axis, f'{axis}_')}{value}" for axis, value in plain.items())
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 13]}-{short_sha256(values)}"


def split_values(text: str) -> list[str]:
    """The values of a comma-separated list: "cosine,linear(beta_start=1e-4, beta_end=0.03)" has two.

    A comma inside brackets is part of its value.
    """
    values, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            values.append("")
        else:
            values[-1] += letter
    return [value.strip() for value in values]


def further_axes(given: list[str]) -> dict[str, list[str]]:
    """["objective.weighting=none,min_snr", "schedule.name=cosine"] -> the values by the name of the axis.

    Raises:
        ValueError: an axis has no value, is given twice, or is the seed.
    """
    axes = {}
    for text in given:
        key, _, values = text.partition("=")
        if not values or key == "seed":
            raise ValueError(f"--axis {text} must be KEY=A,B,... with a config key other than seed: use --seeds")
        name = next((axis for axis, its_key in AXES.items() if its_key == key), key)
        if name in axes:
            raise ValueError(f"--axis {key} is given twice; give all of its values in one --axis {key}=A,B,...")
        axes[name] = split_values(values)
    return axes
