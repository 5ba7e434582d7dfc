"""The variational bound, term by term, in bits per dimension.

Ho et al. (2020), eq. 5: −log p(x_0) ≤ L_T + Σ_{t>1} L_{t−1} + L_0, where L_T is the prior's term, L_{t−1} the KL
from q(x_{t−1} | x_t, x_0) to p_θ(x_{t−1} | x_t), and L_0 what decoding x_0 from x_1 costs.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from diffusion import gaussian, process
from diffusion.reverse import Reverse
from diffusion.schedules import Schedule


class Protocol(NamedTuple):
    """Choices of an evaluation that move its number though the model is the same.

    decoder: (Gaussian, x, num_levels) -> log mass of each element's grey level, in nats.
    decoder_cdf: which normal CDF that is, in words.
    images_multiple: only a multiple of so many images is scored, the remainder dropped.
    """

    decoder: Callable[..., Array]
    decoder_cdf: str
    images_multiple: int


PROTOCOLS: dict[str, Protocol] = {
    "exact": Protocol(gaussian.discretized_log_prob, "exact", 1),
    # What the program behind Ho et al. (2020) does: 9,984 of CIFAR-10's 10,000 test images.
    "ho2020": Protocol(gaussian.tanh_discretized_log_prob, "tanh approximation, masses clamped at 1e-12", 256),
}


def bits_per_dim(nats: Float[ArrayLike, "*shape"]) -> Float[ArrayLike, ""]:
    """The mean over an image's dimensions of nats, in bits."""
    return jnp.mean(nats) / math.log(2)


def vlb_term_bpd(
    p: Reverse,
    row: Schedule,
    x0: Float[ArrayLike, "h w c"],
    x_t: Float[ArrayLike, "h w c"],
    output: Float[ArrayLike, "h w c_out"],
    num_levels: int = 256,
    clip_x0: bool = True,
    decoder: Callable[..., Array] = gaussian.discretized_log_prob,
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
        decoder: (Gaussian, x0, num_levels) -> log mass of each element, in nats.
    """
    p_prev, _ = p(row, x_t, output, clip_x0)
    decoder_nats = -decoder(p_prev, x0, num_levels)
    kl_nats = gaussian.kl(process.q_posterior(row, x0, x_t), p_prev)
    return bits_per_dim(jnp.where(row.t == 1, decoder_nats, kl_nats))


def prior_bpd(schedule: Schedule, x0: Float[ArrayLike, "h w c"]) -> Float[ArrayLike, ""]:
    """L_T = KL(q(x_T | x_0) ‖ N(0, I)) of one image, in bits/dim; nothing in it is learned."""
    standard_normal = gaussian.Gaussian(jnp.zeros_like(x0), jnp.zeros_like(x0))
    return bits_per_dim(gaussian.kl(process.q_marginal(schedule[schedule.num_steps], x0), standard_normal))


def vlb_batch_bpd(
    denoise: Callable[[Array, Array], Array],
    p: Reverse,
    row: Schedule,
    x0: Float[ArrayLike, "b h w c"],
    keys: Key[Array, " b"],
    num_levels: int = 256,
    clip_x0: bool = True,
    decoder: Callable[..., Array] = gaussian.discretized_log_prob,
) -> tuple[Float[ArrayLike, " b"], Float[ArrayLike, " b"]]:
    """The term of one t of each image's bound, each image with a t of its own, and the error of its x̂_0.

    ε is drawn from the image's key and t, so a term is the same number whatever it is batched with.

    Args:
        denoise: (x_t [B, H, W, C], network_t [B]) -> output.
        p: the reverse process.
        row: `schedule[t]` for t [B].
        x0: images in [-1, 1], on their grey levels.
        keys: one per image.
        num_levels: how many grey levels the decoder distinguishes.
        clip_x0: clip x̂_0 to [-1, 1].
        decoder: (Gaussian, x0, num_levels) -> log mass of each element, in nats.

    Returns:
        The terms [B] in bits/dim, and the mean squared errors [B] of x̂_0, the guess of x_0 that x_t allows, for
        data in [-1, 1].
    """
    return at_one_t(denoise, row, x0, keys, _term_and_mse(p, num_levels, clip_x0, decoder))


def vlb_terms_bpd(
    denoise: Callable[[Array, Array], Array],
    p: Reverse,
    schedule: Schedule,
    x0: Float[ArrayLike, "b h w c"],
    keys: Key[Array, " b"],
    num_levels: int = 256,
    clip_x0: bool = True,
    decoder: Callable[..., Array] = gaussian.discretized_log_prob,
) -> tuple[Float[ArrayLike, "b steps"], Float[ArrayLike, "b steps"]]:
    """Every term of every image's bound, and the error of every x̂_0: `vlb_batch_bpd` for t = 1…T.

    The sum of the terms over t plus `prior_bpd` is an unbiased estimate of the bound.

    Args:
        schedule: its T rows are scanned. The other arguments are those of `vlb_batch_bpd`.

    Returns:
        The terms [B, T] and the mean squared errors [B, T]; entry t − 1 is that of t.
    """
    return over_all_t(denoise, schedule, x0, keys, _term_and_mse(p, num_levels, clip_x0, decoder))


def _term_and_mse(p: Reverse, num_levels: int, clip_x0: bool, decoder: Callable[..., Array]) -> Callable:
    def one(row, x0, x_t, eps, output):
        _, x0_hat = p(row, x_t, output, clip_x0)
        term = vlb_term_bpd(p, row, x0, x_t, output, num_levels, clip_x0, decoder)
        return term, jnp.mean((x0 - x0_hat) ** 2)

    return one


def at_one_t(
    denoise: Callable[[Array, Array], Array],
    row: Schedule,
    x0: Float[ArrayLike, "b h w c"],
    keys: Key[Array, " b"],
    one: Callable[[Schedule, Array, Array, Array, Array], PyTree],
) -> PyTree:
    """one(row, x0, x_t, ε, output) of each image, each with a t of its own; ε is drawn from the image's key and t."""
    eps = jax.vmap(lambda key, t: jax.random.normal(jax.random.fold_in(key, t), x0.shape[1:]))(keys, row.t)
    x_t = jax.vmap(process.q_sample)(row, x0, eps)
    return jax.vmap(one)(row, x0, x_t, eps, denoise(x_t, row.network_t))


def over_all_t(
    denoise: Callable[[Array, Array], Array],
    schedule: Schedule,
    x0: Float[ArrayLike, "b h w c"],
    keys: Key[Array, " b"],
    one: Callable[[Schedule, Array, Array, Array, Array], PyTree],
) -> PyTree:
    """`at_one_t` for t = 1…T, one after another: leaves [B, T], entry t − 1 is that of t."""

    def of_one_t(_, row: Schedule):
        rows = jax.tree.map(lambda leaf: jnp.full(len(x0), leaf), row)
        return None, at_one_t(denoise, rows, x0, keys, one)

    _, terms = jax.lax.scan(of_one_t, None, schedule[1:])
    return jax.tree.map(jnp.transpose, terms)
