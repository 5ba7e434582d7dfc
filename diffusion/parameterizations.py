"""How the bound becomes "predict x_0" or "predict ε": the weight per t of each prediction's squared error.

The KL between Gaussians of one variance σ_t² is a distance of means, ‖μ̃_t − μ_θ‖²/(2σ_t²): Ho et al. (2020), eq. 8.
Given x_t, each prediction is an affine function of each other one. So this distance is a weight per t times the squared
error of whatever the network predicts. With this weight all predictions have the same loss; without it (L_simple) their
losses differ.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float

from diffusion.reverse import VARIANCES, Reverse
from diffusion.schedules import Instant, Row


def x0_per_output(p: Reverse, row: Row) -> Float[ArrayLike, ""]:
    """∂x̂_0/∂output at fixed x_t: −1/√SNR_t for ε, 1 for x_0, −1/√(1 + SNR_t) for v, 1/(coefficient of x_0 in μ̃_t).

    Its square turns a squared error of the output into a squared error of x̂_0.
    """
    zero = jnp.zeros_like(row.log_snr)
    return p.meaning.to_x0(row, zero, zero + 1)


def bound_weight(p: Reverse, row: Row) -> Float[ArrayLike, ""]:
    """w_t in L_{t−1} = w_t ‖target − output‖² + the variances' mismatch, in nats, for t > 1 and an unclipped x̂_0.

    w_t = (coefficient of x_0 in μ̃_t · ∂x̂_0/∂output)² / (2σ_t²). For σ_t² = β̃_t this is

        x_0   ½ (SNR_{t−1} − SNR_t)                   Kingma et al. (2021), section 4
        ε     ½ (SNR_{t−1}/SNR_t − 1)                 the same; Ho et al. (2020), eq. 12
        v     ½ (SNR_{t−1} − SNR_t)/(1 + SNR_t)
        u     ½ (SNR_{t−1} − SNR_t)/(1 + √SNR_t)²     the velocity ε − x_0
        μ̃    1/(2β̃_t)                                Ho et al. (2020), eq. 8

    The code avoids these subtractions, which would cost float32 most of its digits where SNR_t falls slowly. At t = 1,
    where SNR_0 = ∞, it is the weight for the decoder's width; the bound's term there is L_0. At an instant of
    continuous time it is the weight per unit of t, ½ dγ/dt for ε, for every variance.

    Args:
        p: a reverse process with a fixed variance.
        row: the schedule's row of t, or an instant (`continuous_time.at`).

    Raises:
        ValueError: the variance is learned, so the weight would depend on the network and not only on the schedule.
    """
    if p.learns_variance:
        fixed = ", ".join(name for name, variance in VARIANCES.items() if not variance.is_learned)
        raise ValueError(f"variance={p.variance!r} depends on the network, and so does the weight; take one of {fixed}")
    if isinstance(row, Instant):
        # ½ dγ/dt SNR ‖x_0 − x̂_0‖²: Kingma et al. (2021, VDM), eqs. 16 and 17.
        return 0.5 * row.gamma_slope * jnp.exp(row.log_snr) * x0_per_output(p, row) ** 2
    log_var = VARIANCES[p.variance].log_var(row, jnp.zeros_like(row.beta))
    return 0.5 * (row.posterior_x0 * x0_per_output(p, row)) ** 2 * jnp.exp(-log_var)


def weighted_error(
    p: Reverse,
    row: Row,
    x0: Float[ArrayLike, "*shape"],
    x_t: Float[ArrayLike, "*shape"],
    eps: Float[ArrayLike, "*shape"],
    output: Float[ArrayLike, "*shape"],
) -> Float[ArrayLike, "*shape"]:
    """w_t (target − output)² of each element, in nats: Ho et al. (2020), eq. 12, for any prediction.

    With σ_t² = β̃_t this is the KL from q(x_{t−1} | x_t, x_0) to p_θ(x_{t−1} | x_t). The code subtracts no two means,
    because they agree to most of their digits where one step changes little.

    Args:
        p: a reverse process with a fixed variance.
        row: the schedule's row of t.
        x0: the image.
        x_t: `process.q_sample(row, x0, eps)`.
        eps: the noise in x_t.
        output: the network's output for x_t.
    """
    return bound_weight(p, row) * (p.target(row, x0, x_t, eps) - output) ** 2
