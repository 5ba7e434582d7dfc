"""The x̂_0 that a multistep sampler uses during a step: from the polynomial through x̂_0 at several noise levels."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Gauss–Legendre quadrature on [0, 1].
NODES, WEIGHTS = (np.float32(values / 2) for values in np.polynomial.legendre.leggauss(8))
NODES = NODES + np.float32(0.5)


class PastStep(NamedTuple):
    """x̂_0 of an earlier step."""

    x0_hat: Array
    log_snr: Array  # of that step's row; −∞ if there was no such step


def mean_x0(points: tuple[PastStep, ...], begin: Float[Array, ""], end: Float[Array, ""]) -> Float[Array, "b h w c"]:
    """The x̂_0 for a DDIM step from log SNR `begin` to `end`, by the polynomial in log SNR through some points.

    DDIM's ODE is d(x/σ) = x̂_0 d(√ᾱ/σ), and √ᾱ/σ = e^(λ/2) for log SNR λ. So its solution needs the mean of x̂_0 under
    the density e^(λ/2) between the two. With two points the function returns the value at the middle, which is of the
    same order, as the authors of DPM-Solver++ and of UniPC do. Points that do not exist are left out.

    Args:
        points: the first one exists; the others may belong to steps that were never taken.
    """
    mean = points[0].x0_hat
    for number in range(2, len(points) + 1):
        some = points[:number]
        mean = jnp.where(jnp.isfinite(some[-1].log_snr), _mean_of_polynomial(some, begin, end), mean)
    return mean


def _mean_of_polynomial(points: tuple[PastStep, ...], begin: Array, end: Array) -> Array:
    nodes, weights = (NODES, WEIGHTS) if len(points) > 2 else (np.float32([0.5]), np.float32([1.0]))
    density = weights * jnp.exp((nodes - 1) * (end - begin) / 2)
    at = begin + nodes * (end - begin)
    total = jnp.zeros_like(points[0].x0_hat)
    for point in points:  # Lagrange's form
        factors = [(at - other.log_snr) / (point.log_snr - other.log_snr) for other in points if other is not point]
        total += jnp.sum(density * math.prod(factors)) / density.sum() * point.x0_hat
    return total
