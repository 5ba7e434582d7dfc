"""Sampling: the reverse process run from noise to data, one `lax.scan` over the schedule's rows.

A sampler is a `Step`: it gives the Gaussian from which x_{t−1} is drawn. `sample` takes the step at every row of the
schedule; respace the schedule for fewer steps. It draws the noise of each image from that image's own key, so the
images do not depend on the batching.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from diffusion import multistep
from diffusion.churn import NO_LIMIT, Churn, between
from diffusion.gaussian import Gaussian
from diffusion.multistep import PastStep
from diffusion.reverse import Denoise, Denoised, Reverse
from diffusion.schedules import Schedule

AfterStep = Callable[[Schedule, Float[Array, "b h w c"], Key[Array, " b"]], Float[Array, "b h w c"]]


class StepState(NamedTuple):
    """All that a step from x_t to x_{t−1} can use. The arrays are batches."""

    row: Schedule  # of t
    next_row: Schedule  # of t − 1
    x_t: Array
    p_prev: Gaussian  # p_θ(x_{t−1} | x_t)
    x0_hat: Array
    history: tuple[PastStep, PastStep, PastStep]  # at x_{t+1}, x_{t+2} and x_{t+3}
    predict_x0: Callable[[Schedule, Array], Array]  # (row, x) -> x̂_0 there, for another network evaluation


@dataclasses.dataclass(frozen=True)
class Step:
    """A step from x_t to x_{t−1}.

    Steps with the same rule and arguments are equal, so `jax.jit` can take one as a static argument.

    Attributes:
        rule: (now, *arguments) -> the Gaussian from which x_{t−1} is drawn; a function at its module's top.
        arguments: the arguments of the rule, such as η.
        draws_from_variance: whether the step draws with the variance of p, or uses only its x̂_0.
        churn: adds noise to x_t before the network sees it; None for no churn. The row that the rule then gets
            states the noise in x_t, but not the step to `next_row`.
    """

    rule: Callable[..., Gaussian]
    arguments: tuple[float | int, ...] = ()
    draws_from_variance: bool = False
    churn: Churn | None = None

    def __call__(self, now: StepState) -> Gaussian:
        return self.rule(now, *self.arguments)


def sample(
    step: Step,
    denoise: Denoise,
    p: Reverse,
    schedule: Schedule,
    keys: Key[Array, " b"],
    shape: tuple[int, int, int],
    clip_x0: bool = True,
    num_frames: int = 1,
    x_T: Float[Array, "b h w c"] | None = None,
    after_step: AfterStep | None = None,
    levels: Schedule | None = None,
) -> tuple[Float[Array, "b h w c"], Float[Array, "frames b h w c"]]:
    """Draws x_T ~ N(0, I) and takes `step` for t = T…1. Ho et al. (2020), algorithm 2, if the step is `ancestral()`.

    Args:
        step: one of the samplers below.
        denoise: the network as a function.
        p: the reverse process.
        schedule: the steps go through its rows from T to 1.
        keys: one per image.
        shape: an image's (H, W, C).
        clip_x0: clip x̂_0 to [-1, 1].
        num_frames: the number of x̂_0 to return as the denoising trajectory.
        x_T: the start; None draws it from N(0, I) with `keys`.
        after_step: (row of t − 1, x_{t−1} [B, H, W, C], keys of this step [B]) -> x_{t−1}: called after every step, to
            change its result. After the last step the row is that of t = 0, and the result is x_0.
        levels: the schedule that the network learned, from which churn takes its noise levels; None for `schedule`.

    Returns:
        The samples, and the denoising trajectory: x̂_0 from noise to data. A sample is the mean of the last step, which
        adds no noise.

    Raises:
        ValueError: more frames than steps, or x_T does not have one entry for each key.
    """
    num_steps = schedule.num_steps
    _check(num_frames, num_steps, x_T, (len(keys), *shape))

    def predict(row: Schedule, x_t: Array) -> Denoised:
        output = denoise(x_t, jnp.full(len(x_t), row.network_t))
        return jax.vmap(lambda x, out: p(row, x, out, clip_x0))(x_t, output)

    def noise(t):
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, t), shape))(keys)

    def body(carry, rows: tuple[Schedule, Schedule]):
        x_t, history, frames = carry
        row, next_row = rows
        if step.churn is not None:
            row, x_t = step.churn(row, levels or schedule, num_steps, x_t, noise(num_steps + row.t))
        p_prev, x0_hat = predict(row, x_t)
        state = StepState(row, next_row, x_t, p_prev, x0_hat, history, lambda row, x: predict(row, x).x0_hat)
        drawn_from = step(state)
        x_prev = jnp.where(row.t > 1, drawn_from.sample(noise(row.t - 1)), drawn_from.mean)
        if after_step is not None:
            x_prev = after_step(next_row, x_prev, jax.vmap(jax.random.fold_in, (0, None))(hook_keys, row.t))
        # Each frame is overwritten until its last step, so the other steps need no memory.
        frames = frames.at[(num_steps - row.t) * num_frames // num_steps].set(x0_hat)
        return (x_prev, (PastStep(x0_hat, row.log_snr), *history[:-1]), frames), None

    # These keys differ from those of the steps' noise, of churn and of x_T.
    hook_keys = jax.vmap(lambda key: jax.random.fold_in(key, num_steps))(keys)
    if x_T is None:
        x_T = noise(0)  # no step has the number 0, so x_T is the same for any number of steps
    nothing = PastStep(jnp.zeros_like(x_T), jnp.full_like(schedule.log_snr[-1], -jnp.inf))
    start = (x_T, (nothing, nothing, nothing), jnp.zeros((num_frames, *x_T.shape)))
    (x0, _, frames), _ = jax.lax.scan(body, start, (schedule[1:], schedule[:-1]), reverse=True)
    return x0, frames


def _check(num_frames: int, num_steps: int, x_T: Array | None, shape: tuple[int, ...]) -> None:
    if not 1 <= num_frames <= num_steps:
        raise ValueError(f"num_frames={num_frames} must be in 1…{num_steps}, the number of steps")
    if x_T is not None and x_T.shape != shape:
        raise ValueError(f"x_T has the shape {x_T.shape}, not {shape}: an image for each of the keys")


def ancestral() -> Step:
    """x_{t−1} ~ p_θ(x_{t−1} | x_t). Ho et al. (2020), algorithm 2."""
    return Step(_ancestral, draws_from_variance=True)


def _ancestral(now: StepState) -> Gaussian:
    return now.p_prev


def ddim(eta: float | int = 0.0) -> Step:
    """The non-Markovian sampler with the same marginals: η = 0 is deterministic, η = 1 has the variance β̃_t.

    Source: Song, Meng & Ermon (2021), eqs. 12 and 16.

    Raises:
        ValueError: η is outside [0, 1].
    """
    return Step(_ddim, (_share_of_noise(eta),))


def _share_of_noise(eta: float | int) -> float | int:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], not {eta}")
    return eta


def _ddim(now: StepState, eta: float | int) -> Gaussian:
    return ddim_step(now.row, now.x_t, now.x0_hat, eta)


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


def dpm_solver_pp(eta: float | int = 0.0) -> Step:
    """DPM-Solver++(2M): DDIM's ODE to second order, with one network evaluation per step; an SDE with η > 0.

    A DDIM step solves the probability-flow ODE (η = 0) or the reverse SDE (η = 1) exactly, if x̂_0 is constant during
    the step. This sampler uses x̂_0 at the middle of the step in log SNR, extrapolated from this step and the one
    before. The first step is plain DDIM, and so is the last one, which ends at infinite SNR. With η = 1 it is
    SDE-DPM-Solver++(2M); for Gaussian data its means and variances are also of second order.

    Source: Lu et al. (2022, arXiv 2211.01095), algorithm 2 for η = 0, and their SDE-DPM-Solver++ for η = 1.

    Raises:
        ValueError: η is outside [0, 1].
    """
    return Step(_dpm_solver_pp, (_share_of_noise(eta),))


def _dpm_solver_pp(now: StepState, eta: float | int) -> Gaussian:
    last = now.history[0]
    ratio = (now.next_row.log_snr - now.row.log_snr) / (now.row.log_snr - last.log_snr)
    has_middle = jnp.isfinite(now.next_row.log_snr) & jnp.isfinite(last.log_snr)
    halfway = jnp.where(has_middle, ratio / 2, 0.0)
    return ddim_step(now.row, now.x_t, now.x0_hat + halfway * (now.x0_hat - last.x0_hat), eta)


def heun(
    s_churn: float | int = 0.0,
    s_min: float | int = 0.0,
    s_max: float | int = NO_LIMIT,
    s_noise: float | int = 1.0,
) -> Step:
    """Heun's method for DDIM's ODE: second order, with two network evaluations per step but one in the last.

    With σ_t = √(1 − ᾱ_t) the ODE is d(x/σ) = x̂_0 d(√ᾱ/σ), for which a DDIM step (η = 0) is Euler's method. The step is
    taken twice. The second time it uses the mean of x̂_0 at the start and x̂_0 where the first try ended. In these
    variables there is no singularity where ᾱ_T is almost 0.

    Source: Karras et al. (2022, arXiv 2206.00364), algorithm 1, there for d(x/√ᾱ) = ε̂ d(σ/√ᾱ); algorithm 2 with churn.

    Args: as in `Churn`; s_churn = 0 means no churn.

    Raises:
        ValueError: as `Churn` raises it, or another churn argument is set without s_churn.
    """
    churn = Churn(s_churn, s_min, s_max, s_noise)
    if s_churn > 0:
        return Step(_heun, (True,), churn=churn)
    if churn != Churn(s_churn):
        raise ValueError(f"s_min={s_min}, s_max={s_max} and s_noise={s_noise} have no effect with s_churn=0")
    return Step(_heun)


def _heun(now: StepState, is_churned: bool = False) -> Gaussian:
    def moved(x0_hat: Array) -> Array:
        if is_churned:
            return between(now.row, now.next_row, now.x_t, x0_hat)
        return ddim_step(now.row, now.x_t, x0_hat).mean

    # x_0 itself needs no prediction.
    end_x0_hat = jax.lax.cond(now.row.t > 1, now.predict_x0, lambda row, x: x, now.next_row, moved(now.x0_hat))
    mean = moved((now.x0_hat + end_x0_hat) / 2)
    return Gaussian(mean, jnp.full_like(mean, -jnp.inf))


def unipc(order: int = 2) -> Step:
    """UniPC: solves DDIM's ODE by a multistep predictor and a corrector, with one network evaluation per step.

    The predictor goes from x_t to x_{t−1} with the polynomial in log SNR through the last `order` x̂_0. The corrector
    adds the network's x̂_0 at x_{t−1} to these points and repeats the step. This costs no further evaluation, because
    it happens at the start of the next step. With two x̂_0 the polynomial's value at the middle of the step stands for
    its mean, so the predictor of order 2 is `dpm_solver_pp`. The order of the first steps is the number of x̂_0 that
    they have. The last step ends at infinite SNR and is plain DDIM.

    Source: Zhao et al. (2023, arXiv 2302.04867), UniPC-p for predictions of x_0, with B(h) = e^h − 1.

    Raises:
        ValueError: the order is not 1, 2 or 3.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, not {order}")
    return Step(_unipc, (order,))


def _unipc(now: StepState, order: int) -> Gaussian:
    here, past = PastStep(now.x0_hat, now.row.log_snr), now.history[:order]
    came_from = past[0].log_snr
    predicted = multistep.mean_x0(past, came_from, here.log_snr)
    corrected = multistep.mean_x0((here, *past), came_from, here.log_snr)
    # How far a DDIM step goes towards x̂_0: √ᾱ_t (1 − e^−h) with h = ½ Δ log SNR.
    share = now.row.sqrt_alpha_bar * -jnp.expm1((came_from - here.log_snr) / 2)
    x_t = now.x_t + jnp.where(jnp.isfinite(came_from), share * (corrected - predicted), 0.0)
    ahead = multistep.mean_x0((here, *past)[:order], here.log_snr, now.next_row.log_snr)
    return ddim_step(now.row, x_t, jnp.where(now.row.t > 1, ahead, now.x0_hat))


SAMPLERS = {
    "ancestral": ancestral,
    "ddim": ddim,
    "dpm_solver_pp": dpm_solver_pp,
    "heun": heun,
    "unipc": unipc,
}
