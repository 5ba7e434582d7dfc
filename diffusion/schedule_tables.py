"""The tables of a schedule, made from log α_t or from γ_t.

They are computed in NumPy float64 and cast to float32 once. A float32 cumulative product would have a relative error of
1.7e-4 in 1 − ᾱ_1.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# float32 [T + 1], or [] in a row: an array of JAX or NumPy, or its shape.
Table = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """The tables of a forward process, with α_t = 1 − β_t and ᾱ_t = α_1 ⋯ α_t.

    The symbols are those of Ho et al. (2020), section 2. Entry 0 describes clean data: β_0 = 0, ᾱ_0 = 1.
    """

    t: Table  # 0…T, int32
    network_t: Table  # the network's noise input: t − 1 before any respacing, or see `conditioning`
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
    # E Var(x_0 | x_t) per dimension. It depends on the data, so it is None until `variances` estimates it.
    x0_variance: Table | None = None
    # s, if the first step also shrinks the image: see `from_gamma`. None for 1.
    x0_scale: Table | None = None

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
    x0_scale: Table | None = None


def from_gamma(gamma: np.ndarray, network_t: np.ndarray, x0_scale: float | None = None) -> Schedule:
    """The schedule with log SNR_t = −`gamma`[t − 1], for s x_0 instead of x_0 if `x0_scale` = s.

    With s the first step also shrinks the image: x_t = √(1 − σ_t²) s x_0 + σ_t ε with σ_t² = sigmoid(γ_t). In the
    tables √ᾱ_t has the factor s, and 1 − ᾱ_t stands for σ_t². VDM's code has s = 255/256.

    Args:
        gamma: [T], increasing, in float64.
        network_t: [T].
        x0_scale: None for 1.
    """
    return from_log_alpha(np.diff(-np.logaddexp(0.0, gamma), prepend=0.0), network_t, x0_scale)


def from_log_alpha(log_alpha: np.ndarray, network_t: np.ndarray, x0_scale: float | None = None) -> Schedule:
    """All tables from log α_1…log α_T in float64, before the image is shrunk."""
    log_alpha = np.concatenate([[0.0], log_alpha])
    beta, one_minus_alpha_bar = -np.expm1(log_alpha), -np.expm1(np.cumsum(log_alpha))
    one_minus_alpha_bar_prev = np.concatenate([[0.0], one_minus_alpha_bar[:-1]])
    if x0_scale is not None:
        log_alpha[1] += 2 * np.log(x0_scale)
    log_alpha_bar = np.cumsum(log_alpha)
    alpha_bar = np.exp(log_alpha_bar)
    alpha_bar_prev = np.concatenate([[1.0], alpha_bar[:-1]])
    with np.errstate(divide="ignore", invalid="ignore"):  # entry 0 is a limit; see the next lines
        log_beta = np.log(beta)
        log_one_minus_alpha_bar = np.log(one_minus_alpha_bar)
        # Ho et al. (2020), eq. 7.
        beta_tilde = beta * one_minus_alpha_bar_prev / one_minus_alpha_bar
        posterior_x0 = np.sqrt(alpha_bar_prev) * beta / one_minus_alpha_bar
        posterior_x_t = np.sqrt(np.exp(log_alpha)) * one_minus_alpha_bar_prev / one_minus_alpha_bar
        log_beta_tilde = np.log(beta_tilde)
    beta_tilde[0], posterior_x0[0], posterior_x_t[0] = 0.0, 1.0, 0.0  # clean data stays clean
    # β̃_1 = 0 has no logarithm. x_0 given x_1 is decoded with the width of t = 2 (with β_1 if T = 1).
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
        x0_scale=None if x0_scale is None else jnp.full(len(beta), x0_scale, jnp.float32),
    )
