"""Sampling: the reverse process run from noise to data, one `lax.scan` over the schedule's rows.

Every sampler takes the whole batch and a `denoise(x_t [B, H, W, C], network_t [B]) -> output`, walks whatever
schedule it is given (respace it for fewer steps), and draws each image's noise from that image's own key, so
the pictures do not depend on the batching.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from diffusion.gaussian import Gaussian
from diffusion.reverse import Reverse
from diffusion.schedules import Schedule

Denoise = Callable[[Array, Array], Array]
# (row, x_t, p(x_{t−1} | x_t), x̂_0) -> the Gaussian from which x_{t−1} is drawn
Step = Callable[[Schedule, Array, Gaussian, Array], Gaussian]


def ancestral(
    denoise: Denoise,
    p: Reverse,
    schedule: Schedule,
    keys: Key[Array, " b"],
    shape: tuple[int, int, int],
    clip_x0: bool = True,
    num_frames: int = 1,
) -> tuple[Float[Array, "b h w c"], Float[Array, "frames b h w c"]]:
    """x_{t−1} ~ p_θ(x_{t−1} | x_t) for t = T…1. Ho et al. (2020), algorithm 2.

    Args:
        denoise: the network as a function.
        p: the reverse process.
        schedule: its rows are walked from T to 1.
        keys: one per image.
        shape: an image's (H, W, C).
        clip_x0: clip x̂_0 to [-1, 1].
        num_frames: how many x̂_0 along the way to return.

    Returns:
        The samples, and the film of x̂_0 from noise to data; the samples are the mean of the last step, which adds
        no noise.
    """
    return _walk(lambda row, x_t, p_prev, x0_hat: p_prev, denoise, p, schedule, keys, shape, clip_x0, num_frames)


def ddim_step(
    row: Schedule, x_t: Float[ArrayLike, "*shape"], x0_hat: Float[ArrayLike, "*shape"], eta: float | int = 0.0
) -> Gaussian:
    """DDIM's q_σ(x_{t−1} | x_t, x̂_0) with σ² = η² β̃_t. Song, Meng & Ermon (2021), eqs. 7 and 16."""
    eps_hat = (x_t - row.sqrt_alpha_bar * x0_hat) / row.sqrt_one_minus_alpha_bar
    # 1 − ᾱ_{t−1} − σ² with 1 − ᾱ_{t−1} = β̃_t (1 − ᾱ_t)/β_t, because 1 − ᾱ cancels in float32 near t = 0.
    remaining = row.beta_tilde * (row.sqrt_one_minus_alpha_bar**2 / row.beta - eta**2)
    direction = jnp.sqrt(jnp.maximum(remaining, 0.0)) * eps_hat
    mean = jnp.sqrt(row.alpha_bar_prev) * x0_hat + direction
    return Gaussian(mean, jnp.full_like(mean, jnp.log(eta**2 * row.beta_tilde)))  # log 0 = −∞: no noise


def ddim(
    denoise: Denoise,
    p: Reverse,
    schedule: Schedule,
    keys: Key[Array, " b"],
    shape: tuple[int, int, int],
    clip_x0: bool = True,
    num_frames: int = 1,
    eta: float | int = 0.0,
) -> tuple[Float[Array, "b h w c"], Float[Array, "frames b h w c"]]:
    """The non-Markovian sampler with the same marginals: η = 0 is deterministic, η = 1 has the variance β̃_t.

    Source: Song, Meng & Ermon (2021), eqs. 12 and 16. Arguments and results are those of `ancestral`.
    """

    def step(row: Schedule, x_t: Array, p_prev: Gaussian, x0_hat: Array) -> Gaussian:
        return ddim_step(row, x_t, x0_hat, eta)

    return _walk(step, denoise, p, schedule, keys, shape, clip_x0, num_frames)


def _walk(step: Step, denoise, p, schedule, keys, shape, clip_x0, num_frames):
    num_steps = schedule.num_steps
    if not 1 <= num_frames <= num_steps:
        raise ValueError(f"a film of {num_frames} frames cannot be cut from {num_steps} steps")

    def noise(t):
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, t), shape))(keys)

    def body(carry, row: Schedule):
        x_t, film = carry
        output = denoise(x_t, jnp.full(len(keys), row.network_t))
        p_prev, x0_hat = jax.vmap(lambda x, out: p(row, x, out, clip_x0))(x_t, output)
        x_prev = step(row, x_t, p_prev, x0_hat)
        # A frame is overwritten until its last step: the film needs no memory for the steps it leaves out.
        film = film.at[(num_steps - row.t) * num_frames // num_steps].set(x0_hat)
        return (jnp.where(row.t > 1, x_prev.sample(noise(row.t - 1)), x_prev.mean), film), None

    start = (noise(num_steps), jnp.zeros((num_frames, len(keys), *shape)))
    (x0, film), _ = jax.lax.scan(body, start, schedule[1:], reverse=True)
    return x0, film
