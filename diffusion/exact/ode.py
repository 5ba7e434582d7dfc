"""Exact likelihood by the probability-flow ODE, whose solutions have the marginals q(x_t) of the diffusion.

With the log-SNR λ = log ᾱ/(1 − ᾱ) as its time, the ODE of Song et al. (2021, score-based SDEs, eq. 13) for a
variance-preserving process is

    dx/dλ = ½ (σ² x − σ ε̂(x, λ)),    σ² = 1 − ᾱ = sigmoid(−λ),    ε̂ = −σ ∇ log p_λ(x),

and no schedule occurs in it: a schedule only says which λ a trained network knows, and by which number. Along a
solution d log p_λ(x)/dλ = −div dx/dλ (their eq. 39), so log p(x) is the normal log density of where x ends up plus
an integral, both from one solve.

The likelihood is a density. Pixel values must be dequantized first, and −log₂ p of uniformly dequantized data bounds
the bits of the pixel values from above (Theis et al. 2016) for the model that the ODE defines, which is not
the reverse chain of the variational bound: see docs/bound_tightness.md.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

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
# (f, x) -> f(x) and div f(x), or an unbiased estimate of it.
Divergence = Callable[[Callable[[Array], Array], Array], tuple[Array, Array]]


class Solution(NamedTuple):
    """log p(x) in nats, where x ends up, and how many steps the solver took."""

    log_prob_nats: Float[Array, ""]
    end: Float[Array, "*shape"]
    num_steps: Int[Array, ""]


def exact_divergence(f: Callable[[Array], Array], x: Float[Array, "*shape"]) -> tuple[Array, Array]:
    """The trace of the whole Jacobian: as many forward derivatives as x has elements."""
    basis = jnp.eye(x.size).reshape(x.size, *x.shape)
    value, derivatives = jax.vmap(lambda direction: jax.jvp(f, (x,), (direction,)), out_axes=(None, 0))(basis)
    return value, jnp.sum(derivatives * basis)


def hutchinson(probe: Float[Array, "*shape"]) -> Divergence:
    """probeᵀ J probe, from one forward derivative. Hutchinson (1990); Grathwohl et al. (2019, FFJORD).

    Unbiased for a probe with independent elements of mean 0 and variance 1. One probe serves a whole solve. Signs
    (Rademacher) have the smaller variance: the Jacobian's diagonal then adds none.
    """

    def divergence(f: Callable[[Array], Array], x: Float[Array, "*shape"]) -> tuple[Array, Array]:
        value, derivative = jax.jvp(f, (x,), (probe,))
        return value, jnp.sum(probe * derivative)

    return divergence


def eps_predictor(
    denoise: Callable[[Array, Array], Array], p: Reverse, schedule: Schedule, clip_x0: bool = True
) -> PredictEps:
    """A trained network as ε̂(x, λ): at the schedule's own λ_t it is what the network says at t.

    Between them the network is conditioned on a fraction, network_t interpolated linearly in λ. It was never trained
    there: whether it may be asked is for a measurement to say.

    Args:
        denoise: (x_t [B, H, W, C], network_t [B]) -> output.
        p: what the output means; its variance plays no part.
        schedule: concrete (not traced).
        clip_x0: clip x̂_0 to [-1, 1], as the bound does; with outermost bins that are open, nothing in the bound
            teaches a network at t = 1 to stay inside.

    Raises:
        ValueError: prediction="mean", which means nothing between two steps.
    """
    if p.prediction == "mean":
        raise ValueError("model.prediction='mean' predicts x_{t−1} and has no ODE in continuous time; eps, x0, v have")
    if schedule.x0_scale is not None:
        raise ValueError("a schedule with an x0_scale does not preserve the variance, as the ODE here needs it")
    log_snr, network_t = (np.asarray(table, np.float64)[:0:-1] for table in (schedule.log_snr, schedule.network_t))
    known = np.isfinite(log_snr)
    knots, numbers = (jnp.asarray(table[known], jnp.float32) for table in (log_snr, network_t))

    def predict_eps(x: Array, log_snr: Array) -> Array:
        signal, noise = jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))
        # The two numbers by which a prediction other than the mean becomes x̂_0; a row of no step has no others.
        row = dataclasses.replace(schedule[1], sqrt_alpha_bar=signal, sqrt_one_minus_alpha_bar=noise)
        predicted, _ = p.split(denoise(x[None], jnp.interp(log_snr, knots, numbers)[None])[0])
        x0_hat = p.meaning.to_x0(row, x, predicted)
        return (x - signal * (jnp.clip(x0_hat, -1.0, 1.0) if clip_x0 else x0_hat)) / noise

    return predict_eps


def solve(
    predict_eps: PredictEps,
    x: Float[Array, "*shape"],
    log_snr_start: ArrayLike,
    log_snr_end: ArrayLike,
    divergence: Divergence = exact_divergence,
    tolerance: float = 1e-5,
) -> Solution:
    """log p(x) at `log_snr_start` of the model that is N(0, I) at `log_snr_end`; `jax.vmap` it over a batch.

    Args:
        predict_eps: (x, λ) -> ε̂, from `eps_predictor`, or an oracle's.
        x: of the scale of x_t at the start, √ᾱ x_0 for data. (The density of x_0 = x/√ᾱ is that of x times √ᾱ per
            dimension.)
        log_snr_start: the highest log-SNR.
        log_snr_end: the lowest.
        divergence: `exact_divergence`, or `hutchinson(probe)` for an unbiased estimate.
        tolerance: relative and absolute error that the adaptive solver (Tsitouras 5(4)) allows in a step.
    """

    def field(log_snr: Array, state: tuple[Array, Array], _) -> tuple[Array, Array]:
        variance = jax.nn.sigmoid(-log_snr)

        def velocity(x: Array) -> Array:
            return 0.5 * (variance * x - jnp.sqrt(variance) * predict_eps(x, log_snr))

        return divergence(velocity, state[0])

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        t0=log_snr_start,
        t1=log_snr_end,
        dt0=None,
        y0=(x, jnp.zeros(())),
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
    )
    end, integral = (leaf[-1] for leaf in solution.ys)
    zero = jnp.zeros_like(end)
    log_prob = gaussian.log_prob(Gaussian(zero, zero), end).sum() + integral
    return Solution(log_prob, end, solution.stats["num_steps"])


def dequantized_bpd(
    predict_eps: PredictEps,
    schedule: Schedule,
    x0: Float[Array, "h w c"],
    uniform: Float[Array, "h w c"],
    num_levels: int = 256,
    divergence: Divergence = exact_divergence,
    tolerance: float = 1e-5,
) -> Float[Array, ""]:
    """Bits/dim of one image by the density of its uniformly dequantized pixel values, from λ_1 to λ_T.

    The model's density of x_0 is that of √ᾱ_1 x_0 at λ_1 by a change of variables. The mean over `uniform` bounds
    from above the bits of the pixel values themselves under this density integrated over their bins.

    Args:
        x0: the image in [-1, 1], on its pixel values.
        uniform: in [0, 1), where in its bin each element lies.
        num_levels: how many pixel values there are. The other arguments are those of `eps_predictor` and `solve`.
    """
    bin_width = 2 / (num_levels - 1)
    y = x0 + bin_width * (uniform - 0.5)
    signal = schedule.sqrt_alpha_bar[1]
    solution = solve(predict_eps, signal * y, schedule.log_snr[1], schedule.log_snr[-1], divergence, tolerance)
    log_prob = solution.log_prob_nats + x0.size * (jnp.log(signal) + math.log(bin_width))
    return -log_prob / (x0.size * math.log(2))
