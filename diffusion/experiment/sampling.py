"""The sampler of a config: the step, and the grid of steps."""

import contextlib
from collections.abc import Iterator

from ml_collections import ConfigDict

from diffusion.experiment import names
from diffusion.experiment.schema import GRIDS, METHODS
from diffusion.grids import Grid
from diffusion.samplers import Step
from diffusion.schedules import Schedule


def step(config: ConfigDict) -> Step:
    """The step from x_t to x_{t−1}. Raises a ValueError if an argument of the sampler is out of range."""
    with _named(config, "sample.method"):
        return METHODS.bind(config.sample.method)()


def grid(config: ConfigDict) -> Grid:
    """The grid of steps to take."""
    return GRIDS.bind(config.sample.grid)


def is_continuous(config: ConfigDict) -> bool:
    """Whether the grid may visit noise levels between the schedule's steps, so that t is no integer."""
    return names.parse(config.sample.grid).arguments.get("continuous", False)


def check_grid(config: ConfigDict, schedule: Schedule) -> None:
    """Raises a ValueError if there is no such grid with this number of steps."""
    if config.sample.grid != "even":
        with _named(config, "sample.grid"):
            grid(config)(schedule, config.sample.num_steps)


@contextlib.contextmanager
def _named(config: ConfigDict, key: str) -> Iterator[None]:
    """Puts the key and its value before the message of a ValueError."""
    group, _, name = key.partition(".")
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}={config[group][name]!r}: {error}") from error
