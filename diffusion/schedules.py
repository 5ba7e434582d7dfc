"""Noise schedules: how fast the forward process turns data into noise.

A `Schedule` is a pytree of tables indexed by t as the paper counts it: t = 0 is clean data,
t = 1…T are the latents, so every table has T + 1 entries and ᾱ_0 = 1. `schedule[t]` is the same
pytree with scalar leaves, a *row*; all the math of this package is written for one row.

Tables are computed in NumPy float64 and cast to float32 once: a float32 cumulative product would
have a relative error of 1.7e-4 in 1 − ᾱ_1.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# float32 [T + 1], or [] in a row; an array of JAX or of NumPy, or its shape.
Table = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """The tables of a forward process; with α_t = 1 − β_t and ᾱ_t = α_1 ⋯ α_t.

    The symbols are those of Ho et al. (2020), section 2. Entry 0 describes clean data: β_0 = 0, ᾱ_0 = 1.
    """

    t: Table  # 0…T, int32
    network_t: Table  # what the network is conditioned on: t − 1, of the unspaced schedule; or see `conditioning`
    beta: Table  # β_t
    log_beta: Table
    log_alpha: Table
    alpha_bar: Table  # ᾱ_t
    alpha_bar_prev: Table  # ᾱ_{t−1}
    sqrt_alpha_bar: Table
    sqrt_one_minus_alpha_bar: Table
    log_one_minus_alpha_bar: Table
    log_snr: Table  # log ᾱ_t/(1 − ᾱ_t)
    beta_tilde: Table  # β̃_t, the variance of q(x_{t−1} | x_t, x_0); 0 at t = 1
    log_beta_tilde: Table  # finite: the entry of t = 1 is that of t = 2
    log_beta_large: Table  # log β_t, but log β̃_2 at t = 1: Ho et al.'s "fixedlarge"
    posterior_x0: Table  # the coefficient of x_0 in μ̃_t
    posterior_x_t: Table  # the coefficient of x_t in μ̃_t
    # E Var(x_0 | x_t) per dimension: of the data and not of the schedule, so None until `variances` estimated it.
    x0_variance: Table | None = None

    @property
    def num_steps(self) -> int:
        """T, the number of latents."""
        return self.t.shape[0] - 1

    def __getitem__(self, t) -> "Schedule":
        """The row of t: scalar leaves for an int, [B] leaves for an int array [B], a shorter table for a slice.

        Raises:
            IndexError: an int or NumPy array outside 0…T. (JAX would clamp it silently.)
        """
        if isinstance(t, int | np.integer | np.ndarray) and not np.all((0 <= np.asarray(t)) & (t <= self.num_steps)):
            raise IndexError(f"t={t} is outside this schedule's 0…{self.num_steps}")
        return jax.tree.map(lambda table: table[t], self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Instant:
    """q(x_t | x_0) at a real t between two steps, and how fast γ grows there: see `continuous_time.at`."""

    t: Table  # the step that it belongs to, int32
    network_t: Table
    sqrt_alpha_bar: Table
    sqrt_one_minus_alpha_bar: Table
    log_snr: Table
    gamma_slope: Table  # dγ/dt, with γ = −log SNR


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
        return _tables(np.log1p(-betas), network_t=np.arange(betas.size))


def linear(num_steps: int | np.integer, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """β linear in t: Ho et al. (2020), section 4.

    Here and in `quadratic`, `constant` and `warmup` the β are given for T = 1000 and rescaled by 1000/T, so
    that the total noise stays about the same when T changes (Nichol & Dhariwal 2021).
    """
    return from_betas(np.linspace(beta_start, beta_end, _checked(num_steps)) * 1000 / num_steps)


def quadratic(num_steps: int | np.integer, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """√β linear in t (one of the schedules that Ho et al. tried)."""
    with np.errstate(invalid="ignore"):  # of a negative β: `from_betas` refuses it
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

    Since ᾱ_T = 0, x_T says nothing of x_0 and a network cannot predict ε there (use x0, v or mean).
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
    """γ_t = −log SNR_t linear in t from γ_1 = `gamma_min` to γ_T = `gamma_max`; the ends are VDM's for 8-bit images.

    Source: Kingma et al. (2021, VDM), whose γ starts so before it is trained.

    Raises:
        ValueError: gamma_min ≥ gamma_max, or T = 1.
    """
    if not gamma_min < gamma_max:
        raise ValueError(f"linear_gamma: gamma_min={gamma_min} must be below gamma_max={gamma_max} (schedule.name)")
    if _checked(num_steps) == 1:
        raise ValueError("linear_gamma has two ends, so schedule.num_steps=1 must be at least 2")
    log_alpha_bar = -np.logaddexp(0.0, np.linspace(gamma_min, gamma_max, num_steps))
    return _tables(np.diff(log_alpha_bar, prepend=0.0), network_t=np.arange(num_steps))


def rectified_flow(num_steps: int | np.integer, last: float = 1.0) -> Schedule:
    """The log SNR of the linear path (1 − s) x_0 + s ε at s = `last`·t/T: γ_t = 2 log s/(1 − s).

    Its x_t is that path divided by √((1−s)² + s²), so the bound and the samplers are those of the path itself. At
    s = 1 nothing of x_0 is left; a `last` below 1 leaves γ_T finite. Liu et al. (2023, arXiv 2209.03003), eq. 1.

    Raises:
        ValueError: `last` is outside (0, 1].
    """
    if not 0 < last <= 1:
        raise ValueError(f"rectified_flow: last={last} must be in (0, 1] (schedule.name)")
    s = last * np.arange(1, _checked(num_steps) + 1) / num_steps
    with np.errstate(divide="ignore"):  # log ᾱ_T = −∞ is allowed
        log_alpha_bar = -np.logaddexp(0.0, 2 * (np.log(s) - np.log1p(-s)))
    return _tables(np.diff(log_alpha_bar, prepend=0.0), network_t=np.arange(num_steps))


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

    Its β become 1 − ᾱ_{keep_i}/ᾱ_{keep_{i−1}} (Nichol & Dhariwal 2021, section 4) and `network_t` keeps the
    original numbers, which is what the network was trained with.

    Args:
        schedule: T steps, concrete (not traced).
        keep: strictly increasing t's out of 1…T.

    Raises:
        ValueError: `keep` is empty, not increasing, or leaves 1…T.
    """
    keep = np.asarray(keep)
    if keep.ndim != 1 or keep.size == 0 or not np.issubdtype(keep.dtype, np.integer):
        raise ValueError(f"keep must be a list of integers out of 1…{schedule.num_steps}, not {keep!r}")
    if np.any(np.diff(keep) <= 0) or keep[0] < 1 or keep[-1] > schedule.num_steps:
        raise ValueError(f"keep must increase strictly within 1…{schedule.num_steps}, not {keep.tolist()}")
    # Summed from log α and not read from ᾱ: the float32 table of ᾱ has lost what 1 − ᾱ needs near t = 0.
    log_alpha_bar = np.cumsum(np.asarray(schedule.log_alpha, np.float64))[keep]
    before = np.concatenate([[0.0], log_alpha_bar[:-1]])
    log_alpha = np.full(keep.size, -np.inf)  # stays where nothing of x_0 is left
    np.subtract(log_alpha_bar, before, out=log_alpha, where=np.isfinite(log_alpha_bar))
    short = _tables(log_alpha, network_t=np.asarray(schedule.network_t)[keep])
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
    # One step must be the last latent: it is the only one whose marginal is the prior.
    first = 1 if num_steps > 1 else schedule.num_steps
    return respace(schedule, np.linspace(first, schedule.num_steps, num_steps).round().astype(int))


def _checked(num_steps: int | np.integer) -> int:
    if num_steps < 1 or num_steps != int(num_steps):
        raise ValueError(f"the number of steps T must be an integer ≥ 1, not {num_steps} (schedule.num_steps)")
    return int(num_steps)


def _tables(log_alpha: np.ndarray, network_t: np.ndarray) -> Schedule:
    """All tables from log α_1…log α_T in float64."""
    log_alpha = np.concatenate([[0.0], log_alpha])
    log_alpha_bar = np.cumsum(log_alpha)
    log_alpha_bar_prev = np.concatenate([[0.0], log_alpha_bar[:-1]])
    alpha_bar, alpha_bar_prev = np.exp(log_alpha_bar), np.exp(log_alpha_bar_prev)
    beta = -np.expm1(log_alpha)
    one_minus_alpha_bar, one_minus_alpha_bar_prev = -np.expm1(log_alpha_bar), -np.expm1(log_alpha_bar_prev)
    with np.errstate(divide="ignore", invalid="ignore"):  # entry 0 is a limit; see the next lines
        log_beta = np.log(beta)
        log_one_minus_alpha_bar = np.log(one_minus_alpha_bar)
        # Ho et al. (2020), eq. 7.
        beta_tilde = beta * one_minus_alpha_bar_prev / one_minus_alpha_bar
        posterior_x0 = np.sqrt(alpha_bar_prev) * beta / one_minus_alpha_bar
        posterior_x_t = np.sqrt(np.exp(log_alpha)) * one_minus_alpha_bar_prev / one_minus_alpha_bar
        log_beta_tilde = np.log(beta_tilde)
    beta_tilde[0], posterior_x0[0], posterior_x_t[0] = 0.0, 1.0, 0.0  # clean data stays clean
    # β̃_1 = 0 has no logarithm; x_0 given x_1 is decoded with the width of the step before (with β_1 if T = 1).
    log_beta_tilde[:2] = log_beta_tilde[2] if len(beta) > 2 else log_beta[1]
    log_beta_large = log_beta.copy()
    log_beta_large[:2] = log_beta_tilde[:2]

    tables = {
        "network_t": np.concatenate([[-1.0], network_t]),
        "beta": beta,
        "log_beta": log_beta,
        "log_alpha": log_alpha,
        "alpha_bar": alpha_bar,
        "alpha_bar_prev": alpha_bar_prev,
        "sqrt_alpha_bar": np.exp(0.5 * log_alpha_bar),
        "sqrt_one_minus_alpha_bar": np.sqrt(one_minus_alpha_bar),
        "log_one_minus_alpha_bar": log_one_minus_alpha_bar,
        "log_snr": log_alpha_bar - log_one_minus_alpha_bar,
        "beta_tilde": beta_tilde,
        "log_beta_tilde": log_beta_tilde,
        "log_beta_large": log_beta_large,
        "posterior_x0": posterior_x0,
        "posterior_x_t": posterior_x_t,
    }
    return Schedule(
        t=jnp.arange(len(beta), dtype=jnp.int32),
        **{name: jnp.asarray(table.astype(np.float32)) for name, table in tables.items()},
    )
