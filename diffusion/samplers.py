"""Sampling: the reverse process run from noise to data, one `lax.scan` over the schedule's rows.

Every sampler takes the whole batch and a `denoise(x_t [B, H, W, C], network_t [B]) -> output`, walks whatever
schedule it is given (respace it for fewer steps), and draws each image's noise from that image's own key, so
the pictures do not depend on the batching.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from diffusion.gaussian import Gaussian
from diffusion.reverse import Denoise, Reverse
from diffusion.schedules import Schedule


class Moment(NamedTuple):
    """What is known at x_t: all that a step to x_{t−1} may use."""

    row: Schedule  # of t
    next_row: Schedule  # of t − 1
    x_t: Array
    p_prev: Gaussian  # p_θ(x_{t−1} | x_t)
    x0_hat: Array
    last_x0_hat: Array  # x̂_0 as the step before saw it, from x_{t+1}
    last_log_snr: Array  # of that step; −∞ before the first


# -> the Gaussian from which x_{t−1} is drawn
Step = Callable[[Moment], Gaussian]


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
        num_frames: how many x̂_0 of the denoising trajectory to return.

    Returns:
        The samples, which are the mean of the last step: it adds no noise. And the denoising trajectory: x̂_0 from
        noise to data.
    """
    return _walk(lambda now: now.p_prev, denoise, p, schedule, keys, shape, clip_x0, num_frames)


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

    def step(now: Moment) -> Gaussian:
        return ddim_step(now.row, now.x_t, now.x0_hat, eta)

    return _walk(step, denoise, p, schedule, keys, shape, clip_x0, num_frames)


def dpm_solver_pp(
    denoise: Denoise,
    p: Reverse,
    schedule: Schedule,
    keys: Key[Array, " b"],
    shape: tuple[int, int, int],
    clip_x0: bool = True,
    num_frames: int = 1,
) -> tuple[Float[Array, "b h w c"], Float[Array, "frames b h w c"]]:
    """DPM-Solver++(2M): DDIM's ODE to second order, with one network evaluation per step.

    A DDIM step (η = 0) solves the probability-flow ODE exactly for an x̂_0 that stays what it is during the step. Here
    it gets x̂_0 at the middle of the step, in log SNR, extrapolated from this step and the one before; the first step
    is plain DDIM, and so is the last one, which ends at infinite SNR.

    Source: Lu et al. (2022, arXiv 2211.01095), algorithm 2. Arguments and results are those of `ancestral`.
    """

    def step(now: Moment) -> Gaussian:
        ratio = (now.next_row.log_snr - now.row.log_snr) / (now.row.log_snr - now.last_log_snr)
        has_middle = jnp.isfinite(now.next_row.log_snr) & jnp.isfinite(now.last_log_snr)
        halfway = jnp.where(has_middle, ratio / 2, 0.0)
        return ddim_step(now.row, now.x_t, now.x0_hat + halfway * (now.x0_hat - now.last_x0_hat))

    return _walk(step, denoise, p, schedule, keys, shape, clip_x0, num_frames)


def heun(
    denoise: Denoise,
    p: Reverse,
    schedule: Schedule,
    keys: Key[Array, " b"],
    shape: tuple[int, int, int],
    clip_x0: bool = True,
    num_frames: int = 1,
) -> tuple[Float[Array, "b h w c"], Float[Array, "frames b h w c"]]:
    """Heun's method for DDIM's ODE: second order, with two network evaluations per step but one in the last.

    With σ_t = √(1 − ᾱ_t) the ODE is d(x/σ) = x̂_0 d(√ᾱ/σ), for which a DDIM step (η = 0) is Euler's method. The step is
    taken twice: the second time with the mean of x̂_0 at its beginning and x̂_0 where the first one ended. These
    variables have no singularity where ᾱ_T is almost 0.

    Source: Karras et al. (2022, arXiv 2206.00364), algorithm 1 with S_churn = 0, there for d(x/√ᾱ) = ε̂ d(σ/√ᾱ).
    Arguments and results are those of `ancestral`.
    """

    def step(now: Moment) -> Gaussian:
        end = ddim_step(now.row, now.x_t, now.x0_hat).mean

        def predict_x0(x):
            return _predict(denoise, p, now.next_row, x, clip_x0)[1]

        end_x0_hat = jax.lax.cond(now.row.t > 1, predict_x0, lambda x: x, end)  # x_0 itself needs no prediction
        return ddim_step(now.row, now.x_t, (now.x0_hat + end_x0_hat) / 2)

    return _walk(step, denoise, p, schedule, keys, shape, clip_x0, num_frames)


def _predict(denoise: Denoise, p: Reverse, row: Schedule, x_t: Array, clip_x0: bool) -> tuple[Gaussian, Array]:
    """p_θ(x_{t−1} | x_t) and x̂_0 of a batch at one t."""
    output = denoise(x_t, jnp.full(len(x_t), row.network_t))
    return jax.vmap(lambda x, out: p(row, x, out, clip_x0))(x_t, output)


def _walk(step: Step, denoise, p, schedule, keys, shape, clip_x0, num_frames):
    num_steps = schedule.num_steps
    if not 1 <= num_frames <= num_steps:
        raise ValueError(f"num_frames={num_frames} must be in 1…{num_steps}, the number of steps")

    def noise(t):
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, t), shape))(keys)

    def body(carry, rows: tuple[Schedule, Schedule]):
        x_t, last_x0_hat, last_log_snr, frames = carry
        row, next_row = rows
        p_prev, x0_hat = _predict(denoise, p, row, x_t, clip_x0)
        x_prev = step(Moment(row, next_row, x_t, p_prev, x0_hat, last_x0_hat, last_log_snr))
        # A frame is overwritten until its last step, so the steps that are left out need no memory.
        frames = frames.at[(num_steps - row.t) * num_frames // num_steps].set(x0_hat)
        x_prev = jnp.where(row.t > 1, x_prev.sample(noise(row.t - 1)), x_prev.mean)
        return (x_prev, x0_hat, row.log_snr, frames), None

    x_T = noise(0)  # a number that no step takes: the same start for any number of steps
    start = (x_T, jnp.zeros_like(x_T), jnp.float32(-jnp.inf), jnp.zeros((num_frames, *x_T.shape)))
    (x0, _, _, frames), _ = jax.lax.scan(body, start, (schedule[1:], schedule[:-1]), reverse=True)
    return x0, frames


# Those that draw x_{t−1} with the variance of p; the others take only its x̂_0.
DRAW_FROM_VARIANCE = ("ancestral",)
SAMPLERS = {
    "ancestral": ancestral,
    "ddim": ddim,
    "dpm_solver_pp": dpm_solver_pp,
    "heun": heun,
}
