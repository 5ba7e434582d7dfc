"""β_1…β_T of other codebases, from the two end values and T. None is rescaled when T changes."""

from collections.abc import Callable

import numpy as np


def linear(start: float, end: float, num_steps: int) -> np.ndarray:
    """β in equal steps."""
    return np.linspace(start, end, num_steps)


def linear_root(start: float, end: float, num_steps: int) -> np.ndarray:
    """√β in equal steps."""
    return np.linspace(start**0.5, end**0.5, num_steps) ** 2


def sigmoid(start: float, end: float, num_steps: int) -> np.ndarray:
    """A sigmoid from −6 to 6."""
    return start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, num_steps)))


def constant(start: float, end: float, num_steps: int) -> np.ndarray:
    """The end value everywhere."""
    return np.full(num_steps, end)


def warmup(fraction: float) -> Callable[[float, float, int], np.ndarray]:
    """Returns a function: β rises linearly over this fraction of the steps, then keeps the end value."""

    def betas(start: float, end: float, num_steps: int) -> np.ndarray:
        rising = linear(start, end, int(num_steps * fraction))
        return np.concatenate([rising, constant(start, end, num_steps - len(rising))])

    return betas


def harmonic(start: float, end: float, num_steps: int) -> np.ndarray:
    """1/T, 1/(T − 1), …, 1; the end values are ignored."""
    return 1 / np.linspace(num_steps, 1, num_steps)
