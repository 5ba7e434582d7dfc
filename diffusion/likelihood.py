"""The variational bound, term by term, in bits per dimension.

Ho et al. (2020), eq. 5: −log p(x_0) ≤ L_T + Σ_{t>1} L_{t−1} + L_0, where L_T is the prior's term, L_{t−1} the KL
from q(x_{t−1} | x_t, x_0) to p_θ(x_{t−1} | x_t), and L_0 what decoding x_0 from x_1 costs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from diffusion import gaussian, process
from diffusion.reverse import Reverse
from diffusion.schedules import Schedule


def bits_per_dim(nats: Float[ArrayLike, "*shape"]) -> Float[ArrayLike, ""]:
    """The mean over an image's dimensions of nats, in bits."""
    return jnp.mean(nats) / np.log(2)


def vlb_term_bpd(
    p: Reverse,
    row: Schedule,
    x0: Float[ArrayLike, "h w c"],
    x_t: Float[ArrayLike, "h w c"],
    output: Float[ArrayLike, "h w c_out"],
    num_levels: int = 256,
    clip_x0: bool = True,
) -> Float[ArrayLike, ""]:
    """One term of the bound for one image: L_0 at t = 1, L_{t−1} at t > 1, in bits/dim.

    Args:
        p: the reverse process.
        row: the schedule's row of t.
        x0: the image in [-1, 1], on its grey levels.
        x_t: a sample of q(x_t | x_0).
        output: the network's output for x_t, [h, w, p.output_channels(c)].
        num_levels: how many grey levels the decoder distinguishes.
        clip_x0: clip x̂_0 to [-1, 1]: on in evaluation, off in training (the clip has no gradient).
    """
    p_prev, _ = p(row, x_t, output, clip_x0)
    decoder_nats = -gaussian.discretized_log_prob(p_prev, x0, num_levels)
    kl_nats = gaussian.kl(process.q_posterior(row, x0, x_t), p_prev)
    return bits_per_dim(jnp.where(row.t == 1, decoder_nats, kl_nats))


def prior_bpd(schedule: Schedule, x0: Float[ArrayLike, "h w c"]) -> Float[ArrayLike, ""]:
    """L_T = KL(q(x_T | x_0) ‖ N(0, I)) of one image, in bits/dim; nothing in it is learned."""
    standard_normal = gaussian.Gaussian(jnp.zeros_like(x0), jnp.zeros_like(x0))
    return bits_per_dim(gaussian.kl(process.q_marginal(schedule[schedule.num_steps], x0), standard_normal))


def vlb_terms_bpd(
    denoise: Callable[[Array, Array], Array],
    p: Reverse,
    schedule: Schedule,
    x0: Float[ArrayLike, "b h w c"],
    keys: Key[Array, " b"],
    num_levels: int = 256,
    clip_x0: bool = True,
) -> Float[ArrayLike, "b steps"]:
    """Every term of every image's bound: entry t − 1 is the term of t, in bits/dim.

    Each (image, t) draws its own ε from the image's key, so the numbers do not depend on the batching. The sum
    over t plus `prior_bpd` is an unbiased estimate of the bound.

    Args:
        denoise: (x_t [B, H, W, C], network_t [B]) -> output.
        p: the reverse process.
        schedule: its T rows are scanned.
        x0: images in [-1, 1], on their grey levels.
        keys: one per image.
        num_levels: how many grey levels the decoder distinguishes.
        clip_x0: clip x̂_0 to [-1, 1].
    """

    def term(_, row: Schedule):
        eps = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, row.t), x0.shape[1:]))(keys)
        x_t = process.q_sample(row, x0, eps)
        output = denoise(x_t, jnp.full(len(x0), row.network_t))
        one = lambda x0, x_t, output: vlb_term_bpd(p, row, x0, x_t, output, num_levels, clip_x0)  # noqa: E731
        return None, jax.vmap(one)(x0, x_t, output)

    _, terms = jax.lax.scan(term, None, schedule[1:])
    return terms.T
