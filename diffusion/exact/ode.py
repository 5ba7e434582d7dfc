"""Exact likelihood by the probability-flow ODE, whose solutions have the marginals q(x_t) of the diffusion.

With the log-SNR λ = log ᾱ/(1 − ᾱ) as its time, the ODE of Song et al. (2021, score-based SDEs, eq. 13) for a
variance-preserving process is

    dx/dλ = ½ (σ² x − σ ε̂(x, λ)),    σ² = 1 − ᾱ = sigmoid(−λ),    ε̂ = −σ ∇ log p_λ(x),

No schedule occurs in it. A schedule only says at which λ a network was trained, and on which number it is conditioned
there. Along a solution d log p_λ(x)/dλ = −div dx/dλ (their eq. 39). So log p(x) is the normal log density of the end
point plus an integral, and one solve gives both.

The likelihood is a density. Pixel values must be dequantized first, y = x_0 + u with u ~ q(u). The mean of
log q(u) − log p(y) is then an upper bound on the cost of the pixel values (Theis et al. 2016; Ho et al. 2019, Flow++)
under the model that the ODE defines. That model is not the reverse chain of the variational bound: see
docs/likelihoods.md.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from diffusion import gaussian
from diffusion.gaussian import Gaussian
from diffusion.reverse import Reverse
from diffusion.schedules import Schedule

try:
    import diffrax
except ImportError as error:
    raise ImportError("diffusion.exact.ode needs diffrax: pip install -c constraints.txt -e '.[ode]'") from error

# (x, λ) -> ε̂(x, λ), for one example.
PredictEps = Callable[[Array, Array], Array]
# (f, x) -> f(x) and div f(x), or one or more unbiased estimates of div f(x).
Divergence = Callable[[Callable[[Array], Array], Array], tuple[Array, Array]]

MAX_STEPS = 4096  # of the solver


class Solution(NamedTuple):
    """log p(x) in nats, the end point, and the number of solver steps.

    log p(x) has one value for each estimate of the divergence. It is NaN if the solver needed more than MAX_STEPS.
    """

    log_prob_nats: Float[Array, "*estimates"]
    end: Float[Array, "*shape"]
    num_steps: Int[Array, ""]


class Dequantized(NamedTuple):
    """An image with noise in the bins of its pixel values, and log q of that noise in nats."""

    y: Float[Array, "h w c"]
    log_noise_nats: Float[Array, ""]


def exact_divergence(f: Callable[[Array], Array], x: Float[Array, "*shape"]) -> tuple[Array, Array]:
    """f(x) and the trace of its Jacobian, from as many forward derivatives as x has elements."""
    basis = jnp.eye(x.size).reshape(x.size, *x.shape)
    value, derivatives = jax.vmap(lambda direction: jax.jvp(f, (x,), (direction,)), out_axes=(None, 0))(basis)
    return value, jnp.sum(derivatives * basis)


def hutchinson(probe: Float[Array, "*shape"]) -> Divergence:
    """probeᵀ J probe, from one forward derivative. Hutchinson (1990); Grathwohl et al. (2019, FFJORD).

    It is unbiased if the probe's elements are independent with mean 0 and variance 1. One probe serves a whole solve.
    Signs (Rademacher) have a smaller variance than normal elements: the Jacobian's diagonal then adds none.
    """

    def divergence(f: Callable[[Array], Array], x: Float[Array, "*shape"]) -> tuple[Array, Array]:
        value, derivative = jax.jvp(f, (x,), (probe,))
        return value, jnp.sum(probe * derivative)

    return divergence


def hutchinson_each(probes: Float[Array, "j *shape"]) -> Divergence:
    """`hutchinson` for each of several probes: j estimates from one solve, whose spread shows their error."""

    def divergence(f: Callable[[Array], Array], x: Float[Array, "*shape"]) -> tuple[Array, Array]:
        derivative = jax.vmap(lambda probe: jax.jvp(f, (x,), (probe,)), out_axes=(None, 0))
        value, derivatives = derivative(probes)
        return value, jnp.sum((probes * derivatives).reshape(len(probes), -1), axis=1)

    return divergence


def eps_predictor(
    denoise: Callable[[Array, Array], Array], p: Reverse, schedule: Schedule, clip_x0: bool = True
) -> PredictEps:
    """A trained network as ε̂(x, λ). At the schedule's own λ_t it is the network's ε̂ at t.

    Between them the network is conditioned on a fraction: network_t interpolated linearly in λ. It was not trained
    there, so its accuracy there must be measured.

    Args:
        denoise: (x_t [B, H, W, C], network_t [B]) -> output.
        p: the meaning of the output; its variance is not used.
        schedule: the schedule that the network was trained with.
        clip_x0: clip x̂_0 to [-1, 1], as the bound does. The outermost bins are open, so the bound does not teach a
            network at t = 1 to stay inside.

    Raises:
        ValueError: prediction="mean", which is defined only between two steps, or a schedule with an x0_scale.
    """
    if p.prediction == "mean":
        raise ValueError("model.prediction='mean' predicts x_{t−1} and has no ODE in continuous time; use eps, x0 or v")
    if schedule.x0_scale is not None:
        raise ValueError("a schedule with an x0_scale does not preserve the variance, which this ODE requires")
    # If ᾱ_T = 0, λ_T = −∞ is replaced; no λ below `lowest` is used.
    knots = jnp.maximum(schedule.log_snr[:0:-1], lowest(schedule) - 1)
    numbers = jnp.asarray(schedule.network_t, jnp.float32)[:0:-1]

    def predict_eps(x: Array, log_snr: Array) -> Array:
        signal, noise = jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))
        # These two numbers turn any prediction but the mean into x̂_0. Between two steps no others are defined.
        row = dataclasses.replace(schedule[1], sqrt_alpha_bar=signal, sqrt_one_minus_alpha_bar=noise)
        predicted, _ = p.split(denoise(x[None], jnp.interp(log_snr, knots, numbers)[None])[0])
        x0_hat = p.meaning.to_x0(row, x, predicted)
        return (x - signal * (jnp.clip(x0_hat, -1.0, 1.0) if clip_x0 else x0_hat)) / noise

    return predict_eps


def lowest(schedule: Schedule) -> Float[Array, ""]:
    """The lowest finite log SNR of a step: λ_T, or λ_{T−1} where ᾱ_T = 0."""
    log_snr = jnp.asarray(schedule.log_snr)
    return jnp.min(jnp.where(jnp.isfinite(log_snr), log_snr, jnp.inf))


def solve(
    predict_eps: PredictEps,
    x: Float[Array, "*shape"],
    log_snr_start: ArrayLike,
    log_snr_end: ArrayLike,
    divergence: Divergence = exact_divergence,
    tolerance: ArrayLike = 1e-5,
) -> Solution:
    """log p(x) at `log_snr_start` under the model that is N(0, I) at `log_snr_end`. Use `jax.vmap` for a batch.

    Args:
        predict_eps: (x, λ) -> ε̂, from `eps_predictor`, or `Mixture.eps`.
        x: on the scale of x_t at the start: √ᾱ x_0 for data. (The density of x_0 = x/√ᾱ is the density of x times √ᾱ
            per dimension.)
        log_snr_start: the highest log-SNR.
        log_snr_end: the lowest.
        divergence: `exact_divergence`, or `hutchinson(probe)` for an unbiased estimate, or `hutchinson_each(probes)`.
        tolerance: the relative and absolute error that the adaptive solver (Tsitouras 5(4)) allows in a step.
    """

    def field(log_snr: Array, state: tuple[Array, Array], _) -> tuple[Array, Array]:
        variance = jax.nn.sigmoid(-log_snr)

        def velocity(x: Array) -> Array:
            return 0.5 * (variance * x - jnp.sqrt(variance) * predict_eps(x, log_snr))

        return divergence(velocity, state[0])

    estimates = jax.eval_shape(lambda x: divergence(lambda x: x, x)[1], x)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        t0=log_snr_start,
        t1=log_snr_end,
        dt0=None,
        y0=(x, jnp.zeros(estimates.shape)),
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
        max_steps=MAX_STEPS,
        throw=False,
    )
    end, integral = (leaf[-1] for leaf in solution.ys)
    zero = jnp.zeros_like(end)
    log_prob = gaussian.log_prob(Gaussian(zero, zero), end).sum() + integral
    log_prob = jnp.where(solution.result == diffrax.RESULTS.successful, log_prob, jnp.nan)
    return Solution(log_prob, end, solution.stats["num_steps"])


def uniform(key: Key[Array, ""], x0: Float[Array, "h w c"], schedule: Schedule, num_levels: int) -> Dequantized:
    """Noise that is uniform over each pixel value's bin."""
    return in_bins(x0, jax.random.uniform(key, x0.shape), num_levels)


def in_bins(x0: Float[Array, "h w c"], fraction: Float[Array, "h w c"], num_levels: int) -> Dequantized:
    """The image with each element at the given fraction in [0, 1) of its bin, and the log density of uniform noise."""
    bin_width = 2 / (num_levels - 1)
    return Dequantized(x0 + bin_width * (fraction - 0.5), -x0.size * jnp.log(bin_width))


def truncated_normal(
    key: Key[Array, ""], x0: Float[Array, "h w c"], schedule: Schedule, num_levels: int
) -> Dequantized:
    """The noise of x_1/√ᾱ_1, truncated at the ends of the bins: √ᾱ_1 y is then like the x_1 of training.

    Source: Zheng et al. (2023, i-DODE), whose code (model_vdm.py, "tn") also truncates it at half a bin.
    """
    std = jnp.exp(-0.5 * schedule.log_snr[1])
    cut = 1 / (num_levels - 1) / std
    z = jax.random.truncated_normal(key, -cut, cut, x0.shape)
    # The mass within the cut is erf(cut/√2).
    log_scale = jnp.log(std) + jnp.log(jax.lax.erf(cut / jnp.sqrt(2.0)))
    zero = jnp.zeros_like(z)
    return Dequantized(x0 + std * z, jnp.sum(gaussian.log_prob(Gaussian(zero, zero), z) - log_scale))


# eval.likelihood's dequantization: (key, x0, schedule, num_levels) -> Dequantized.
DEQUANTIZATIONS = {"uniform": uniform, "truncated_normal": truncated_normal}


def density_bpd(
    predict_eps: PredictEps,
    schedule: Schedule,
    dequantized: Dequantized,
    divergence: Divergence = exact_divergence,
    tolerance: ArrayLike = 1e-5,
) -> tuple[Float[Array, "*estimates"], Int[Array, ""]]:
    """Bits/dim of one image under the density of its dequantized pixel values, and the number of solver steps.

    The ODE is solved from λ_1 to λ_T. The density of x_0 follows from that of √ᾱ_1 x_0 at λ_1 by a change of variables.
    The mean over the noise is an upper bound on the bits of the pixel values under this density integrated over bins.

    Args:
        dequantized: from `uniform` or `truncated_normal`. For the other arguments see `eps_predictor` and `solve`.
    """
    y, log_noise_nats = dequantized
    signal = schedule.sqrt_alpha_bar[1]
    solution = solve(predict_eps, signal * y, schedule.log_snr[1], lowest(schedule), divergence, tolerance)
    log_prob = solution.log_prob_nats + y.size * jnp.log(signal)
    return (log_noise_nats - log_prob) / (y.size * jnp.log(2.0)), solution.num_steps


def dequantized_bpd(
    predict_eps: PredictEps,
    schedule: Schedule,
    x0: Float[Array, "h w c"],
    uniform: Float[Array, "h w c"],
    num_levels: int = 256,
    divergence: Divergence = exact_divergence,
    tolerance: ArrayLike = 1e-5,
) -> Float[Array, "*estimates"]:
    """`density_bpd` of an image with given uniform noise, without the number of steps.

    Args:
        x0: the image in [-1, 1], on its pixel values.
        uniform: the position of each element in its bin, in [0, 1).
        num_levels: the number of pixel values.
    """
    return density_bpd(predict_eps, schedule, in_bins(x0, uniform, num_levels), divergence, tolerance)[0]
