"""Averages of the parameters whose length is chosen after training: Karras et al. (2023, EDM2), section 3.

A power-function average at step n weights the parameters of step i by about i^γ,

    θ̂_γ(n) = (γ + 1)/n^{γ+1} ∫_0^n i^γ θ(i) di,                                                 eq. 4

so it covers a fixed fraction of the training. Its length σ_rel is the standard deviation of the weights over n. Two
averages are tracked, and saved at regular steps. An average of another length is a linear combination of the saved
ones: a least-squares fit of their weights to its weights gives the coefficients.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree, Real

SHORTEST, LONGEST = 0.01, 0.28  # lengths; the plain mean (γ = 0) has 1/√12 = 0.289


def exponent(length: float) -> float:
    """γ for a given σ_rel: σ_rel² = (γ + 1)/((γ + 2)² (γ + 3)). EDM2, eq. 123 and algorithm 2."""
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def track(averages: Sequence[PyTree], params: PyTree, step: Int[Array, ""], lengths: Sequence[float]) -> tuple:
    """The averages updated with the parameters after `step`, counted from 1. EDM2, eq. 127: β = (1 − 1/n)^{γ+1}.

    After the first step each average is a copy of the parameters, whatever it was before.
    """
    log_kept = jnp.log1p(-1.0 / step.astype(jnp.float32))

    def tracked(average: PyTree, length: float) -> PyTree:
        new = -jnp.expm1((exponent(length) + 1) * log_kept)
        return jax.tree.map(lambda old, now: old + new * (now - old), average, params)

    return tuple(tracked(average, length) for average, length in zip(averages, lengths, strict=True))


def coefficients(
    steps: Real[ArrayLike, " kept"], lengths: Float[ArrayLike, " kept"], step: int, length: float
) -> Float[np.ndarray, " kept"]:
    """The coefficients of the saved averages in the average of `length` at `step`. They sum to 1.

    They are the least-squares fit of its weights by theirs: EDM2, algorithm 3.

    Args:
        steps, lengths: the step and the length of each saved average; no two are alike.
    """
    steps, gammas = np.asarray(steps, np.float64), np.array([exponent(one) for one in np.asarray(lengths)])
    between = _inner(steps[:, None], gammas[:, None], steps[None], gammas[None])
    with_target = _inner(steps, gammas, np.asarray(step, np.float64), exponent(length))
    found = np.linalg.solve(between, with_target)
    return found / found.sum()


def misfit(
    factors: Float[ArrayLike, " kept"],
    steps: Real[ArrayLike, " kept"],
    lengths: Float[ArrayLike, " kept"],
    step: int,
    length: float,
) -> float:
    """How far the weights of the combined averages are from the wanted ones: ‖difference‖/‖wanted‖.

    Args:
        factors: from `coefficients`, of the other arguments.
    """
    gammas = np.array([exponent(one) for one in (*np.asarray(lengths), length)])
    ends, of_each = np.append(steps, step).astype(np.float64), np.append(factors, -1.0)
    products = _inner(ends[:, None], gammas[:, None], ends[None], gammas[None])
    return float(np.sqrt(max(0.0, of_each @ products @ of_each / products[-1, -1])))


def _inner(n_a: ArrayLike, gamma_a: ArrayLike, n_b: ArrayLike, gamma_b: ArrayLike) -> np.ndarray:
    """∫ of the product of two averages' weights: EDM2, eq. 151."""
    last = np.maximum(n_a, n_b)
    # The earlier one's weights end at n_a/n_b of the later one's.
    ratio = (n_a / n_b) ** np.where(n_a < n_b, gamma_b, -np.asarray(gamma_a))
    return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * last)
