"""Time between the steps of a schedule, and T → ∞: the bound of Kingma et al. (2021, VDM) without discretization.

Between t − 1 and t, γ = −log SNR is linear in t. So a schedule's T entries are the knots of a curve, which is what a
finer schedule is read from (`resampled`), and whose instants (`at`) the continuous-time bound is an integral over:

    L_∞ = ½ ∫_1^T dγ/dt E‖ε − ε̂‖² dt                                                                VDM, eq. 17

The knot γ_1 is VDM's γ(0), and our T is one more than theirs: their z_0 is our x_1.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Real

from diffusion import process
from diffusion.learned_schedule import from_gamma
from diffusion.schedules import Instant, Row, Schedule


def rows(schedule: Schedule, t: Real[Array, "*b"]) -> Row:
    """The rows of t: those of steps, `schedule[t]`, for integers; instants for real numbers."""
    return at(schedule, t) if jnp.issubdtype(t.dtype, jnp.floating) else schedule[t]


def at(schedule: Schedule, t: Real[Array, "*b"]) -> Instant:
    """The instants t in [1, T]; differentiable in γ. `network_t` is linear between the table's entries."""
    step_number = jnp.clip(jnp.ceil(t).astype(jnp.int32), 2, schedule.num_steps)
    back = step_number.astype(t.dtype) - t  # how much of the step is still to come
    row, before = schedule[step_number], schedule[step_number - 1]
    # Not the difference of two γ, which would cancel: see `process.gamma_step`.
    slope = jax.vmap(process.gamma_step)(row) if t.ndim else process.gamma_step(row)
    gamma = -row.log_snr - back * slope
    return Instant(
        t=step_number,
        network_t=row.network_t - back * (row.network_t - before.network_t),
        sqrt_alpha_bar=jnp.exp(-0.5 * jax.nn.softplus(gamma)),
        sqrt_one_minus_alpha_bar=jnp.exp(-0.5 * jax.nn.softplus(-gamma)),
        log_snr=-gamma,
        gamma_slope=slope,
    )


def resampled(schedule: Schedule, num_steps: int) -> Schedule:
    """The process with `num_steps` latents at equal distances of t on the same curve, with the same two ends.

    `network_t` is interpolated as γ is. So a network that is conditioned on γ, or was trained in continuous time, has
    a bound for every T.

    Args:
        schedule: concrete (not traced), T ≥ 2, γ_T finite.
        num_steps: at least 2.

    Raises:
        ValueError: num_steps < 2.
    """
    if num_steps < 2:
        raise ValueError(f"a schedule with two ends has at least 2 steps, not {num_steps}")
    passed = _gamma_passed(schedule)
    where = np.linspace(0, schedule.num_steps - 1, num_steps)
    return _through(schedule, np.interp(where, np.arange(len(passed)), passed), where)


def visiting(schedule: Schedule, gamma: np.ndarray) -> Schedule:
    """The process whose latents have these γ, on the same curve.

    Args:
        schedule: that of `resampled`.
        gamma: from γ_1 to γ_T, strictly increasing, float64; at least 2.

    Raises:
        ValueError: fewer than 2.
    """
    if len(gamma) < 2:
        raise ValueError(f"a schedule with two ends has at least 2 steps, not {len(gamma)}")
    passed, from_start = _gamma_passed(schedule), gamma - gamma[0]
    return _through(schedule, from_start, np.interp(from_start, passed, np.arange(len(passed))))


def _gamma_passed(schedule: Schedule) -> np.ndarray:
    """γ_t − γ_1 for t = 1…T. Not differences of the table, which would cancel: see `process.gamma_step`."""
    steps = np.asarray(jax.vmap(process.gamma_step)(schedule[2:]), np.float64)
    return np.concatenate([[0.0], np.cumsum(steps)])


def _through(schedule: Schedule, passed: np.ndarray, where: np.ndarray) -> Schedule:
    """The process that has passed so much of γ since γ_1 at each of its latents, which lie `where` (t − 1) in this."""
    numbers = np.asarray(schedule.network_t, np.float64)[1:]
    network_t = np.concatenate([[-1.0], np.interp(where, np.arange(len(numbers)), numbers)])
    found = from_gamma(-schedule.log_snr[1], jnp.asarray(np.diff(passed), jnp.float32))
    return dataclasses.replace(found, network_t=jnp.asarray(network_t, jnp.float32))
