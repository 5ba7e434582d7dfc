"""Variances after training: the optimal σ*_t of a trained mean, and the cost of any variance in bits/dim.

σ*_t² = β̃_t + (coefficient of x_0 in μ̃_t)² E Var(x_0 | x_t): q(x_{t−1} | x_t) is wider than q(x_{t−1} | x_t, x_0) by
the uncertainty about x_0 given x_t. E Var(x_0 | x_t) depends on t through q(x_t | x_0) alone, so one estimate serves
every respacing of the schedule. The estimate is the schedule's table `x0_variance`, which `reverse.make(...,
"optimal")` reads.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from diffusion import gaussian, process
from diffusion.batching import if_any
from diffusion.gaussian import Gaussian
from diffusion.likelihood import Measure, bits_per_dim
from diffusion.reverse import DECODERS, Reverse, Variance
from diffusion.schedules import Schedule


class X0Variance(NamedTuple):
    """An estimate of E Var(x_0 | x_t) per dimension, for t = 0…T, and its standard error."""

    mean: Float[np.ndarray, " steps"]
    stderr: Float[np.ndarray, " steps"]

    @classmethod
    def over_images(cls, per_image: Float[ArrayLike, "n t"]) -> "X0Variance":
        """The mean over independent images, kept in [0, 1].

        The variance of numbers in [-1, 1] is in [0, 1] (Bao et al. 2022, theorem 2), but an estimate near t = T may
        leave that range. The standard error is that of the mean before the clip.

        Raises:
            ValueError: there is one image only, so no error can be estimated.
        """
        if len(per_image) < 2:
            raise ValueError(f"a variance with its standard error needs at least 2 images, not {len(per_image)}")
        per_image = np.asarray(per_image, np.float64)
        mean = np.clip(per_image.mean(axis=0), 0.0, 1.0)
        stderr = per_image.std(axis=0, ddof=1) / len(per_image) ** 0.5
        return cls(*(np.concatenate([[0.0], table]).astype(np.float32) for table in (mean, stderr)))


class X0Terms(NamedTuple):
    """Two unbiased estimates of Var(x_0 | x_t) per dimension that agree if the network is E[x_0 | x_t].

    analytic: (1 − ᾱ_t)/ᾱ_t · (1 − ‖ε̂‖²/d), from the size of the prediction alone; x̂_0 is not clipped, because its ε̂
        would then not be the conditional mean. Bao et al. (2022, Analytic-DPM), theorem 1.
    error: ‖x_0 − x̂_0‖²/d with x̂_0 as the reverse process uses it: the variance that this mean needs, exact or not.
        Bao et al. (2022, "Estimating the optimal covariance with imperfect mean").
    """

    analytic: Float[Array, "..."]
    error: Float[Array, "..."]


class Split(NamedTuple):
    """One term of the bound in bits/dim, as a sum: KL(q ‖ p_θ) = variance mismatch + mean error for t > 1.

    decoder: L_0 at t = 1, else 0.
    mismatch: the cost of the variance if the mean were the posterior's; 0 at t = 1.
    mean_error: the cost of the mean at this variance, ‖μ̃ − μ_θ‖²/2σ²; 0 at t = 1.
    """

    decoder: Float[Array, "..."]
    mismatch: Float[Array, "..."]
    mean_error: Float[Array, "..."]


def interpolated(fraction: float) -> Variance:
    """log σ_t² at `fraction` of the way from log β̃_t (0: fixed_small) to log β_t (1: fixed_large)."""
    return Variance(
        lambda row, raw: jnp.full_like(raw, fraction * row.log_beta_large + (1 - fraction) * row.log_beta_tilde),
        is_learned=False,
    )


def x0_terms(p: Reverse, clip_x0: bool = True) -> Measure:
    """Both estimates for one image and t: the measure (row, x0, x_t, eps, output) -> X0Terms.

    Use training images. Test images scored with their own variance would look too good.

    Args:
        p: the reverse process; only its prediction matters.
        clip_x0: whether the reverse process clips x̂_0, which `error` follows.
    """

    def measure(row: Schedule, x0: Array, x_t: Array, eps: Array, output: Array) -> X0Terms:
        x0_hat = p(row, x_t, output, clip_x0=False).x0_hat
        eps_hat = (x_t - row.sqrt_alpha_bar * x0_hat) / row.sqrt_one_minus_alpha_bar
        # ε² replaces its mean 1. Most of the noise then cancels for large t, where ε̂ is close to ε.
        unexplained = jnp.mean((eps - eps_hat) * (eps + eps_hat))
        mean_error = p(row, x_t, output, clip_x0).p_prev.mean - process.q_posterior(row, x0, x_t).mean
        error = jnp.mean((mean_error / row.posterior_x0) ** 2)
        # If ᾱ_T = 0, ε̂ says nothing about x_0.
        analytic = jnp.where(row.alpha_bar > 0, jnp.exp(-row.log_snr) * unexplained, error)
        return X0Terms(analytic, error)

    return measure


def split_terms_bpd(
    p: Reverse, candidates: Mapping[str, Variance], num_levels: int = 256, clip_x0: bool = True
) -> Measure:
    """`likelihood.term_and_x0_mse` under each candidate variance, split, from one network pass per image and t.

    The mean, the noise and x_t are the same for all candidates, so their differences are paired.

    Args:
        p: the reverse process that the network was trained for; its variance is replaced by each candidate.
        candidates: variances by name. Learned ones read the network's second half, so they need a p of their own kind.
        num_levels: how many pixel values the decoder distinguishes.
        clip_x0: clip x̂_0 to [-1, 1].

    Returns:
        The measure (row, x0, x_t, eps, output) -> the Split of each candidate, whose three parts sum to the term.
    """

    def measure(row: Schedule, x0: Array, x_t: Array, eps: Array, output: Array) -> dict[str, Split]:
        mean = p(row, x_t, output, clip_x0).p_prev.mean
        _, raw = p.split(output)
        posterior = process.q_posterior(row, x0, x_t)

        def split(log_var: Array) -> Split:
            p_prev, right_mean = Gaussian(mean, log_var), Gaussian(posterior.mean, log_var)
            decoded = p.decoding(row, x_t, p_prev)
            decoder = if_any(row.t == 1, lambda: -DECODERS[p.decoder](decoded, x0, num_levels))
            mismatch, mean_error = gaussian.kl(posterior, right_mean), gaussian.kl(right_mean, p_prev)
            is_decoder = row.t == 1
            return Split(
                decoder=bits_per_dim(jnp.where(is_decoder, decoder, 0.0)),
                mismatch=bits_per_dim(jnp.where(is_decoder, 0.0, mismatch)),
                mean_error=bits_per_dim(jnp.where(is_decoder, 0.0, mean_error)),
            )

        # One program for all candidates. A loop over them would take many times as long to compile.
        splits = jax.vmap(split)(jnp.stack([variance.log_var(row, raw) for variance in candidates.values()]))
        return {name: jax.tree.map(lambda leaf, k=k: leaf[k], splits) for k, name in enumerate(candidates)}

    return measure
