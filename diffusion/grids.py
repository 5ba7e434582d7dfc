"""Grids: the noise levels that a sampler visits when it takes fewer steps than the schedule has.

A grid is a function of the schedule and the number of steps N. It returns a schedule of N steps, whose first and last
latents are those of t = 1 and t = T. A network that learned the steps of a chain knows no noise level between them, so
each level of a grid is rounded to the t with the nearest log SNR. If several levels have the same nearest t, the
noisier ones take the next free t, so N steps always have N different t. A network that is conditioned on γ, or was
trained in continuous time, also knows the levels between. For such a network, `continuous=True` rounds no level.
"""

from collections.abc import Callable

import numpy as np

from diffusion import continuous_time, schedules
from diffusion.schedules import Schedule

Grid = Callable[[Schedule, int], Schedule]


def log_snr(schedule: Schedule, num_steps: int, continuous: bool = False) -> Schedule:
    """Equal distances in log SNR: "logSNR" in the code of Lu et al. (2022, DPM-Solver, arXiv 2206.00927).

    Args:
        schedule: concrete (not traced), with a finite log SNR at t = T.
        num_steps: 1…T; at least 2 with `continuous`.
        continuous: whether the levels may lie between the schedule's steps.

    Raises:
        ValueError: num_steps is out of range, or log SNR_T = −∞.
    """
    first, last = _ends(schedule)
    return _visiting(schedule, np.linspace(first, last, num_steps), continuous)


def karras(schedule: Schedule, num_steps: int, rho: float = 7.0, continuous: bool = False) -> Schedule:
    """Equal distances in σ^(1/ρ), where σ² = (1 − ᾱ)/ᾱ = 1/SNR: Karras et al. (2022, arXiv 2206.00364), eq. 5.

    ρ = 1 means equal distances in σ. A greater ρ puts more steps near the data; its limit is `log_snr`.

    Args:
        rho: ρ ≥ 1; the other arguments are those of `log_snr`.

    Raises:
        ValueError: ρ < 1, or what `log_snr` raises.
    """
    if not rho >= 1:
        raise ValueError(f"rho must be at least 1, not {rho}")
    power = 1 / (2 * rho)  # γ = 2 log σ
    first, last = _ends(schedule)
    roots = np.linspace(np.exp(power * first), np.exp(power * last), num_steps)
    return _visiting(schedule, np.log(roots) / power, continuous)


GRIDS = {
    "even": schedules.evenly_spaced,
    "log_snr": log_snr,
    "karras": karras,
}


def _ends(schedule: Schedule) -> tuple[float, float]:
    """γ_1 and γ_T."""
    if not np.isfinite(schedule.log_snr[-1]):
        raise ValueError("a grid of log SNR needs an end, and log SNR_T = −∞; take sample.grid='even'")
    return -float(schedule.log_snr[1]), -float(schedule.log_snr[-1])


def _visiting(schedule: Schedule, gamma: np.ndarray, continuous: bool) -> Schedule:
    """The process that visits the noise levels γ = −log SNR, which increase from γ_1 to γ_T."""
    if continuous:
        return continuous_time.visiting(schedule, gamma)
    num_steps, known = len(gamma), -np.asarray(schedule.log_snr, np.float64)[1:]
    if not 1 <= num_steps <= len(known):
        raise ValueError(f"cannot keep {num_steps} of {len(known)} steps (config key sample.num_steps)")
    nearest = 1 + np.abs(known[:, None] - gamma).argmin(axis=0)
    # The last latent must be included: only its marginal is the prior.
    nearest[-1] = len(known)
    number = np.arange(num_steps)
    increasing = np.maximum.accumulate(nearest - number) + number
    return schedules.respace(schedule, np.minimum(increasing, len(known) - num_steps + 1 + number))
