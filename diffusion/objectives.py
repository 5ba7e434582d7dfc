"""Training losses: one number for one example and one t.

Each function returns the loss and its named parts, which are logged and name the culprit when a loss is not
finite. The caller takes the batch's mean once.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion import likelihood
from diffusion.reverse import Reverse
from diffusion.schedules import Schedule

Loss = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]

# log(squared error of a prediction / squared error of the x̂_0 it stands for), as a function of log SNR: so every
# loss below is a weighted loss of x̂_0. Salimans & Ho (2022), section 4.
LOG_ERROR_RATIO: dict[str, Callable[[Float[Array, "*shape"]], Float[Array, "*shape"]]] = {
    "eps": lambda log_snr: log_snr,
    "x0": lambda log_snr: jnp.zeros_like(log_snr),
    "v": jax.nn.softplus,  # log(1 + SNR)
}


def unweighted(log_snr: Float[Array, "*shape"], prediction: str) -> Float[Array, "*shape"]:
    """1: whatever the prediction's own squared error emphasises."""
    return jnp.ones_like(log_snr)


def p2(log_snr: Float[Array, "*shape"], prediction: str, gamma: float = 1.0) -> Float[Array, "*shape"]:
    """1/(1 + SNR)^γ for ε; for x_0 and v what makes it the same loss. P2 of Choi et al. (2022), with their k = 1.

    It takes weight from the large SNR, where only imperceptible detail is left to learn.
    """
    log_weight_of_x0 = log_snr - gamma * jax.nn.softplus(log_snr)
    return jnp.exp(log_weight_of_x0 - LOG_ERROR_RATIO[prediction](log_snr))


def min_snr(log_snr: Float[Array, "*shape"], prediction: str, gamma: float = 5.0) -> Float[Array, "*shape"]:
    """min(SNR, γ) for x_0; so min(SNR, γ)/SNR for ε and min(SNR, γ)/(SNR + 1) for v: the same loss.

    Source: Hang et al. (2023), section 3.4.
    """
    log_weight_of_x0 = jnp.minimum(log_snr, np.log(gamma))
    return jnp.exp(log_weight_of_x0 - LOG_ERROR_RATIO[prediction](log_snr))


WEIGHTINGS = {"none": unweighted, "p2": p2, "min_snr": min_snr}


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a loss needs to know beside the example.

    Attributes:
        p: the reverse process.
        num_steps: T.
        num_levels: the data's grey levels.
        weighting: of the simple loss: (log SNR, prediction) -> weight. See `WEIGHTINGS`.
    """

    p: Reverse
    num_steps: int
    num_levels: int = 256
    weighting: Callable[[Float[Array, "*shape"], str], Float[Array, "*shape"]] = unweighted


def simple(
    problem: Problem,
    row: Schedule,
    x0: Float[Array, "h w c"],
    x_t: Float[Array, "h w c"],
    eps: Float[Array, "h w c"],
    output: Float[Array, "h w c_out"],
) -> Loss:
    """The mean squared error of the prediction, times its weight. L_simple of Ho et al. (2020), eq. 14, for ε.

    The part "mse" is the error without the weight.
    """
    predicted, _ = problem.p.split(output)
    mse = jnp.mean((problem.p.target(row, x0, x_t, eps) - predicted) ** 2)
    return problem.weighting(row.log_snr, problem.p.prediction) * mse, {"mse": mse}


def vlb(
    problem: Problem,
    row: Schedule,
    x0: Float[Array, "h w c"],
    x_t: Float[Array, "h w c"],
    eps: Float[Array, "h w c"],
    output: Float[Array, "h w c_out"],
) -> Loss:
    """T times the bound's term: with t uniform, an unbiased estimate of the bound less its prior term, in bits/dim.

    Ho et al. (2020), eq. 5. x̂_0 is not clipped: the clip would have no gradient.
    """
    bpd = problem.num_steps * likelihood.vlb_term_bpd(
        problem.p, row, x0, x_t, output, problem.num_levels, clip_x0=False
    )
    return bpd, {"vlb_bpd": bpd}


def hybrid(
    problem: Problem,
    row: Schedule,
    x0: Float[Array, "h w c"],
    x_t: Float[Array, "h w c"],
    eps: Float[Array, "h w c"],
    output: Float[Array, "h w c_out"],
) -> Loss:
    """L_simple + 0.001 L_vlb, where the bound trains the variance only. Nichol & Dhariwal (2021), eq. 16."""
    predicted, raw_variance = problem.p.split(output)
    weighted_mse, parts = simple(problem, row, x0, x_t, eps, output)
    variance_only = jnp.concatenate([jax.lax.stop_gradient(predicted), raw_variance], axis=-1)
    bpd, bound_parts = vlb(problem, row, x0, x_t, eps, variance_only)
    return weighted_mse + 0.001 * bpd, parts | bound_parts


OBJECTIVES = {"simple": simple, "vlb": vlb, "hybrid": hybrid}
