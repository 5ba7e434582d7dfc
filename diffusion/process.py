"""The fixed forward process q, for one example and one row of the schedule.

Shapes are unbatched, usually [H, W, C]; for a batch write `jax.vmap(process.q_sample)(schedule[t], x0, eps)`.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float

from diffusion.gaussian import Gaussian
from diffusion.schedules import Row, Schedule


def q_marginal(row: Schedule, x0: Float[ArrayLike, "*shape"]) -> Gaussian:
    """q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I). Ho et al. (2020), eq. 4."""
    return Gaussian(row.sqrt_alpha_bar * x0, jnp.full_like(x0, row.log_one_minus_alpha_bar))


def q_sample(
    row: Row, x0: Float[ArrayLike, "*shape"], eps: Float[ArrayLike, "*shape"]
) -> Float[ArrayLike, "*shape"]:
    """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε, a sample of q(x_t | x_0) for ε ~ N(0, I). Ho et al. (2020), eq. 4."""
    return row.sqrt_alpha_bar * x0 + row.sqrt_one_minus_alpha_bar * eps


def q_step(row: Schedule, x_prev: Float[ArrayLike, "*shape"]) -> Gaussian:
    """q(x_t | x_{t−1}) = N(√(1 − β_t) x_{t−1}, β_t I). Ho et al. (2020), eq. 2."""
    return Gaussian(jnp.exp(0.5 * row.log_alpha) * x_prev, jnp.full_like(x_prev, row.log_beta))


def q_posterior(row: Schedule, x0: Float[ArrayLike, "*shape"], x_t: Float[ArrayLike, "*shape"]) -> Gaussian:
    """q(x_{t−1} | x_t, x_0) = N(μ̃_t(x_t, x_0), β̃_t I). Ho et al. (2020), eqs. 6 and 7.

    β̃_1 = 0 has no logarithm; at t = 1 `log_var` is that of t = 2.
    """
    mean = row.posterior_x0 * x0 + row.posterior_x_t * x_t
    return Gaussian(mean, jnp.full_like(x0, row.log_beta_tilde))


def gamma_step(row: Schedule) -> Float[ArrayLike, ""]:
    """γ_t − γ_{t−1} with γ_t = −log SNR_t: the noise of a step; ∞ at t = 1, which starts at clean data.

    The forward process depends on the schedule through γ alone (Kingma et al. 2021, VDM, section 3). The difference is
    computed from expm1(γ_t − γ_{t−1}) = SNR_{t−1}/SNR_t − 1 = β_t/(α_t (1 − ᾱ_{t−1})), whose logarithms are tables. In
    float32 a difference of the γ themselves would cancel where steps are small.
    """
    log_one_minus_alpha_bar_prev = row.log_beta_tilde - row.log_beta + row.log_one_minus_alpha_bar
    log_expm1 = row.log_beta - row.log_alpha - log_one_minus_alpha_bar_prev
    return jnp.where(row.t > 1, jax.nn.softplus(log_expm1), jnp.inf)
