"""Noise schedules: how fast the forward process turns data into noise.

A `Schedule` is a pytree of tables indexed by t as in the paper: t = 0 is clean data, t = 1…T are the latents. So every
table has T + 1 entries, and ᾱ_0 = 1. `schedule[t]` is the same pytree with scalar leaves, a *row*. All the math of this
package is written for one row.

`schedule_tables` makes the tables.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike

from diffusion.schedule_tables import Instant, Schedule, from_gamma, from_log_alpha

Row = Schedule | Instant


def from_betas(betas) -> Schedule:
    """The schedule with β_1…β_T = `betas`.

    Args:
        betas: [T], each in (0, 1]; pass float64 to keep the tables' accuracy.

    Raises:
        ValueError: `betas` is empty or not one-dimensional, or a β is outside (0, 1].
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or betas.size == 0:
        raise ValueError(f"betas must be a list of T ≥ 1 numbers, not an array of shape {betas.shape}")
    bad = np.flatnonzero(~((betas > 0) & (betas <= 1)))
    if bad.size:
        raise ValueError(
            f"β must lie in (0, 1], but β_{bad[0] + 1} = {betas[bad[0]]:.6g} (schedule.num_steps={betas.size})"
        )
    with np.errstate(divide="ignore"):  # β_T = 1 is allowed: log α_T = −∞
        return from_log_alpha(np.log1p(-betas), network_t=np.arange(betas.size))


def linear(num_steps: int | np.integer, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """β linear in t: Ho et al. (2020), section 4.

    Here and in `quadratic`, `constant` and `warmup` the β are given for T = 1000 and rescaled by 1000/T. So the total
    noise stays about the same when T changes (Nichol & Dhariwal 2021).
    """
    return from_betas(np.linspace(beta_start, beta_end, _checked(num_steps)) * 1000 / num_steps)


def quadratic(num_steps: int | np.integer, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """√β linear in t, one of the schedules that Ho et al. tried."""
    with np.errstate(invalid="ignore"):  # from a negative β, which `from_betas` refuses
        ends = np.sqrt([beta_start, beta_end])
    return from_betas(np.linspace(*ends, _checked(num_steps)) ** 2 * 1000 / num_steps)


def constant(num_steps: int | np.integer, beta: float = 0.02) -> Schedule:
    """The same β in every step."""
    return from_betas(np.full(_checked(num_steps), beta) * 1000 / num_steps)


def warmup(
    num_steps: int | np.integer, fraction: float | int = 0.1, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Schedule:
    """β linear in the first `fraction` of the steps, then constant.

    Raises:
        ValueError: `fraction` is outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"the warm-up fraction must lie in [0, 1], not {fraction}")
    betas = np.full(_checked(num_steps), beta_end)
    ramp = int(num_steps * fraction)
    betas[:ramp] = np.linspace(beta_start, beta_end, ramp)
    return from_betas(betas * 1000 / num_steps)


def harmonic(num_steps: int | np.integer) -> Schedule:
    """β_t = 1/(T − t + 1), that is 1/T … 1: ᾱ_t falls linearly to 0 (Sohl-Dickstein et al. 2015).

    Since ᾱ_T = 0, x_T does not depend on x_0, so predict x0, v or mean and not ε.
    """
    return from_betas(1.0 / np.arange(_checked(num_steps), 0, -1))


def cosine(num_steps: int | np.integer, offset: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """ᾱ_t = f(t/T)/f(0) with f(u) = cos²(π/2 · (u + offset)/(1 + offset)), β clipped at `max_beta`.

    Source: Nichol & Dhariwal (2021), eq. 17.

    Raises:
        ValueError: the offset is negative.
    """
    if offset < 0:
        raise ValueError(f"the offset of the cosine schedule must be at least 0, not {offset}")
    u = np.arange(_checked(num_steps) + 1) / num_steps
    f = np.cos(np.pi / 2 * (u + offset) / (1 + offset)) ** 2
    return from_betas(np.minimum(1 - f[1:] / f[:-1], max_beta))


def linear_gamma(num_steps: int | np.integer, gamma_min: float = -13.3, gamma_max: float = 5.0) -> Schedule:
    """γ_t = −log SNR_t linear in t from γ_1 = `gamma_min` to γ_T = `gamma_max`; by default VDM's for 8-bit images.

    Source: Kingma et al. (2021, VDM), where γ has this form before training.

    Raises:
        ValueError: gamma_min ≥ gamma_max, or T = 1.
    """
    if not gamma_min < gamma_max:
        raise ValueError(f"linear_gamma: gamma_min={gamma_min} must be below gamma_max={gamma_max} (schedule.name)")
    if _checked(num_steps) == 1:
        raise ValueError("linear_gamma has two ends, so schedule.num_steps=1 must be at least 2")
    return from_gamma(np.linspace(gamma_min, gamma_max, num_steps), network_t=np.arange(num_steps))


def rectified_flow(num_steps: int | np.integer, last: float = 1.0) -> Schedule:
    """The log SNR of the linear path (1 − s) x_0 + s ε at s = `last`·t/T: γ_t = 2 log (s/(1 − s)).

    Its x_t is that path divided by √((1−s)² + s²), so the bound and the samplers are those of the path itself. At
    s = 1 nothing of x_0 is left; with `last` below 1, γ_T is finite. Liu et al. (2023, arXiv 2209.03003), eq. 1.

    Raises:
        ValueError: `last` is outside (0, 1].
    """
    if not 0 < last <= 1:
        raise ValueError(f"rectified_flow: last={last} must be in (0, 1] (schedule.name)")
    s = last * np.arange(1, _checked(num_steps) + 1) / num_steps
    with np.errstate(divide="ignore"):  # log ᾱ_T = −∞ is allowed
        log_alpha_bar = -np.logaddexp(0.0, 2 * (np.log(s) - np.log1p(-s)))
    return from_log_alpha(np.diff(log_alpha_bar, prepend=0.0), network_t=np.arange(num_steps))


SCHEDULES = {
    "linear": linear,
    "cosine": cosine,
    "quadratic": quadratic,
    "constant": constant,
    "warmup": warmup,
    "harmonic": harmonic,
    "linear_gamma": linear_gamma,
    "rectified_flow": rectified_flow,
}


def respace(schedule: Schedule, keep: Sequence[int] | ArrayLike) -> Schedule:
    """The process that visits only the latents `keep`, with the same marginals q(x_t | x_0) there.

    Its β become 1 − ᾱ_{keep_i}/ᾱ_{keep_{i−1}} (Nichol & Dhariwal 2021, section 4). `network_t` keeps the original
    numbers, with which the network was trained.

    Args:
        schedule: T steps, concrete (not traced).
        keep: strictly increasing values of t in 1…T.

    Raises:
        ValueError: `keep` is empty, not increasing, or leaves 1…T.
    """
    keep = np.asarray(keep)
    if keep.ndim != 1 or keep.size == 0 or not np.issubdtype(keep.dtype, np.integer):
        raise ValueError(f"keep must be a list of integers out of 1…{schedule.num_steps}, not {keep!r}")
    if np.any(np.diff(keep) <= 0) or keep[0] < 1 or keep[-1] > schedule.num_steps:
        raise ValueError(f"keep must increase strictly within 1…{schedule.num_steps}, not {keep.tolist()}")
    # Summed from log α: the float32 table of ᾱ lacks the digits that 1 − ᾱ needs near t = 0.
    scale = None if schedule.x0_scale is None else float(schedule.x0_scale[0])
    log_alpha_bar = np.cumsum(np.asarray(schedule.log_alpha, np.float64))[keep] - (2 * np.log(scale) if scale else 0.0)
    before = np.concatenate([[0.0], log_alpha_bar[:-1]])
    log_alpha = np.full(keep.size, -np.inf)  # stays −∞ where ᾱ = 0
    np.subtract(log_alpha_bar, before, out=log_alpha, where=np.isfinite(log_alpha_bar))
    short = from_log_alpha(log_alpha, np.asarray(schedule.network_t)[keep], scale)
    if schedule.x0_variance is None:
        return short
    return dataclasses.replace(short, x0_variance=schedule.x0_variance[np.concatenate([[0], keep])])


def evenly_spaced(schedule: Schedule, num_steps: int | np.integer) -> Schedule:
    """`respace` to `num_steps` latents at equal distances from t = 1 to t = T.

    Raises:
        ValueError: `num_steps` is outside 1…T.
    """
    if not 1 <= num_steps <= schedule.num_steps:
        raise ValueError(f"cannot keep {num_steps} of {schedule.num_steps} steps (config key sample.num_steps)")
    # The last latent must be included: only its marginal is the prior.
    first = 1 if num_steps > 1 else schedule.num_steps
    return respace(schedule, np.linspace(first, schedule.num_steps, num_steps).round().astype(int))


def _checked(num_steps: int | np.integer) -> int:
    if num_steps < 1 or num_steps != int(num_steps):
        raise ValueError(f"the number of steps T must be an integer ≥ 1, not {num_steps} (schedule.num_steps)")
    return int(num_steps)
