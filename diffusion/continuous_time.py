"""Time between the steps of a schedule, and T → ∞: the bound of Kingma et al. (2021, VDM) without discretization.

Between t − 1 and t, γ = −log SNR is linear in t. So the T entries of a schedule are the knots of a curve. A finer
schedule is read from this curve (`resampled`), and the continuous-time bound is an integral over its instants (`at`):

    L_∞ = ½ ∫_1^T dγ/dt E‖ε − ε̂‖² dt                                                                VDM, eq. 17

The knot γ_1 is VDM's γ(0). Our T is one more than theirs, because their z_0 is our x_1.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Real

from diffusion import parameterizations, process
from diffusion.batching import if_any
from diffusion.likelihood import Measure, bayes_decoder_bpd, bits_per_dim
from diffusion.reverse import Reverse
from diffusion.schedule_tables import from_gamma
from diffusion.schedules import Instant, Row, Schedule


def rows(schedule: Schedule, t: Real[Array, "*b"]) -> Row:
    """The rows of t: `schedule[t]` for integers, instants for real numbers."""
    return at(schedule, t) if jnp.issubdtype(t.dtype, jnp.floating) else schedule[t]


def at(schedule: Schedule, t: Real[Array, "*b"]) -> Instant:
    """The instants t in [1, T], differentiable in γ. `network_t` is linear between the table's entries."""
    step_number = jnp.clip(jnp.ceil(t).astype(jnp.int32), 2, schedule.num_steps)
    back = step_number.astype(t.dtype) - t  # the part of the step that is still to come
    row, before = schedule[step_number], schedule[step_number - 1]
    # Not the difference of two γ, which would cancel: see `process.gamma_step`.
    slope = jax.vmap(process.gamma_step)(row) if t.ndim else process.gamma_step(row)
    gamma = -row.log_snr - back * slope
    scale, shift = (1.0, 0.0) if row.x0_scale is None else (row.x0_scale, 2 * jnp.log(row.x0_scale))
    return Instant(
        t=step_number,
        network_t=row.network_t - back * (row.network_t - before.network_t),
        sqrt_alpha_bar=scale * jnp.exp(-0.5 * jax.nn.softplus(gamma + shift)),
        sqrt_one_minus_alpha_bar=jnp.exp(-0.5 * jax.nn.softplus(-gamma - shift)),
        log_snr=-gamma,
        gamma_slope=slope,
        x0_scale=row.x0_scale,
    )


def resampled(schedule: Schedule, num_steps: int) -> Schedule:
    """The process with `num_steps` latents at equal distances in t on the same curve, with the same ends.

    `network_t` is interpolated like γ. So a network that is conditioned on γ, or was trained in continuous time, has a
    bound for every T.

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
        schedule: as in `resampled`.
        gamma: at least 2 values from γ_1 to γ_T, strictly increasing, float64.

    Raises:
        ValueError: fewer than 2 values.
    """
    if len(gamma) < 2:
        raise ValueError(f"a schedule with two ends has at least 2 steps, not {len(gamma)}")
    passed, from_start = _gamma_passed(schedule), gamma - gamma[0]
    return _through(schedule, from_start, np.interp(from_start, passed, np.arange(len(passed))))


def _gamma_passed(schedule: Schedule) -> np.ndarray:
    """γ_t − γ_1 for t = 1…T. Differences of table entries would cancel: see `process.gamma_step`."""
    steps = np.asarray(jax.vmap(process.gamma_step)(schedule[2:]), np.float64)
    return np.concatenate([[0.0], np.cumsum(steps)])


def _through(schedule: Schedule, passed: np.ndarray, where: np.ndarray) -> Schedule:
    """The process whose latents are this far in γ from γ_1, and lie at `where` (t − 1) in this schedule."""
    numbers = np.asarray(schedule.network_t, np.float64)[1:]
    network_t = np.interp(where, np.arange(len(numbers)), numbers)
    scale = None if schedule.x0_scale is None else float(schedule.x0_scale[0])
    gamma_1 = -np.float64(schedule.log_snr[1]) + (2 * np.log(scale) if scale else 0.0)
    return from_gamma(gamma_1 + passed, network_t, scale)


def term_and_x0_mse(p: Reverse, num_levels: int = 256, clip_x0: bool = True) -> Measure:
    """`likelihood.term_and_x0_mse` for the bound of VDM. Its measure also takes an instant, where it is per unit of t.

    The variance is always β̃_t and the decoder "bayes", whatever `p` has. The code subtracts no two means, because for
    a large T they agree to more digits than float32 has.

    Args:
        p: the meaning of the network's output: eps, x0 or v.
        num_levels: how many pixel values there are.
        clip_x0: clip x̂_0 to [-1, 1]; VDM's code does not.
    """
    of_x0, of_output = Reverse("x0", "fixed_small"), dataclasses.replace(p, variance="fixed_small")

    def measure(row: Row, x0: Array, x_t: Array, eps: Array, output: Array) -> tuple[Array, Array]:
        predicted, _ = p.split(output)
        x0_hat = p.meaning.to_x0(row, x_t, predicted)
        if clip_x0:
            x0_hat = jnp.clip(x0_hat, -1.0, 1.0)
            nats = parameterizations.weighted_error(of_x0, row, x0, x_t, eps, x0_hat)
        else:
            nats = parameterizations.weighted_error(of_output, row, x0, x_t, eps, predicted)
        decoder = if_any(row.t == 1, lambda: bayes_decoder_bpd(row, x0, eps, num_levels))
        return jnp.where(row.t == 1, decoder, bits_per_dim(nats)), jnp.mean((x0 - x0_hat) ** 2)

    return measure
