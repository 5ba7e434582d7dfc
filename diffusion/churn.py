"""Churn: a sampler of the ODE adds noise before each step, and the step then removes it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion.schedules import Schedule

NO_LIMIT = 1e30  # of s_max; a config has no name for ∞


@dataclasses.dataclass(frozen=True)
class Churn:
    """x_t is made noisier before each step: from σ to (1 + min(S_churn/N, √2 − 1)) σ for N steps; σ = √(1 − ᾱ)/√ᾱ.

    The network is evaluated at the nearest level in log SNR that it knows. The authors' code also rounds to the
    levels of a discrete network.

    Source: Karras et al. (2022, arXiv 2206.00364), algorithm 2.

    Attributes:
        s_churn: S_churn, the amount of noise that all steps together add.
        s_min, s_max: noise is added only where σ is in [s_min, s_max].
        s_noise: the scale of the noise that is added.

    Raises:
        ValueError: a negative number, or s_min > s_max.
    """

    s_churn: float | int
    s_min: float | int = 0.0
    s_max: float | int = NO_LIMIT
    s_noise: float | int = 1.0

    def __post_init__(self):
        if not (self.s_churn >= 0 and 0 <= self.s_min <= self.s_max and self.s_noise >= 0):
            raise ValueError(
                f"s_churn={self.s_churn}, s_min={self.s_min}, s_max={self.s_max} and s_noise={self.s_noise} must be at "
                "least 0, and s_min at most s_max"
            )

    def __call__(
        self,
        row: Schedule,
        levels: Schedule,
        num_steps: int,
        x_t: Float[Array, "b h w c"],
        noise: Float[Array, "b h w c"],
    ) -> tuple[Schedule, Float[Array, "b h w c"]]:
        """Returns the row of the noisier level, with the t of `row`, and x there.

        Args:
            row: the row of x_t.
            levels: the schedule that the network knows.
            num_steps: N.
        """
        sigma = jnp.exp(-row.log_snr / 2)
        gamma = min(self.s_churn / num_steps, math.sqrt(2) - 1)
        wanted = row.log_snr - 2 * math.log1p(gamma)
        nearest = levels[1 + jnp.argmin(jnp.abs(levels.log_snr[1:] - wanted))]
        is_churned = (self.s_min <= sigma) & (sigma <= self.s_max) & (nearest.log_snr < row.log_snr)
        reached = jax.tree.map(lambda new, old: jnp.where(is_churned, new, old), nearest, row)
        # The forward process between the two levels.
        var = reached.sqrt_one_minus_alpha_bar**2 * -jnp.expm1(reached.log_snr - row.log_snr)
        std = jnp.where(is_churned, self.s_noise * jnp.sqrt(var), 0.0)
        x = jnp.where(is_churned, reached.sqrt_alpha_bar / row.sqrt_alpha_bar, 1.0) * x_t + std * noise
        return dataclasses.replace(reached, t=row.t), x


def between(
    row: Schedule, next_row: Schedule, x_t: Float[Array, "*shape"], x0_hat: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """The step of DDIM's ODE for x̂_0 held constant, between rows that need not belong to one chain."""
    eps_hat = (x_t - row.sqrt_alpha_bar * x0_hat) / row.sqrt_one_minus_alpha_bar
    return next_row.sqrt_alpha_bar * x0_hat + next_row.sqrt_one_minus_alpha_bar * eps_hat
