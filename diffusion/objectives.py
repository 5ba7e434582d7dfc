"""Training losses: one number for one example and one t.

Each function returns the loss and its named parts, which are logged and name the culprit when a loss is not
finite. The caller takes the batch's mean once.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion import likelihood
from diffusion.reverse import Reverse
from diffusion.schedules import Schedule

Loss = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a loss needs to know beside the example: the reverse process, T, and the data's grey levels."""

    p: Reverse
    num_steps: int
    num_levels: int = 256


def simple(
    problem: Problem,
    row: Schedule,
    x0: Float[Array, "h w c"],
    x_t: Float[Array, "h w c"],
    eps: Float[Array, "h w c"],
    output: Float[Array, "h w c_out"],
) -> Loss:
    """The mean squared error of the prediction. L_simple of Ho et al. (2020), eq. 14, for ε."""
    predicted, _ = problem.p.split(output)
    mse = jnp.mean((problem.p.target(row, x0, x_t, eps) - predicted) ** 2)
    return mse, {"mse": mse}


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
    mse, parts = simple(problem, row, x0, x_t, eps, output)
    variance_only = jnp.concatenate([jax.lax.stop_gradient(predicted), raw_variance], axis=-1)
    bpd, bound_parts = vlb(problem, row, x0, x_t, eps, variance_only)
    return mse + 0.001 * bpd, parts | bound_parts


OBJECTIVES = {"simple": simple, "vlb": vlb, "hybrid": hybrid}
