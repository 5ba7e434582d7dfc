"""Variances after training: the optimal σ*_t of a trained mean, and what any variance costs in bits/dim.

σ*_t² = β̃_t + (coefficient of x_0 in μ̃_t)² E Var(x_0 | x_t): q(x_{t−1} | x_t) is wider than q(x_{t−1} | x_t, x_0) by
what x_t leaves open about x_0. E Var(x_0 | x_t) depends on t through q(x_t | x_0) alone, so one estimate serves every
respacing of the schedule: it is the schedule's table `x0_variance`, which `reverse.make(..., "optimal")` reads.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from diffusion import files, gaussian, process
from diffusion.gaussian import Gaussian
from diffusion.likelihood import bits_per_dim, over_all_t
from diffusion.reverse import Reverse, Variance
from diffusion.schedules import Schedule

FILE = "x0_variance.npz"  # beside a run's checkpoints
Denoise = Callable[[Array, Array], Array]


class X0Variance(NamedTuple):
    """An estimate of E Var(x_0 | x_t) per dimension, for t = 0…T, and its standard error."""

    mean: Float[np.ndarray, " steps"]
    stderr: Float[np.ndarray, " steps"]

    @classmethod
    def over_images(cls, per_image: Float[ArrayLike, "n t"]) -> "X0Variance":
        """The mean over independent images, kept in [0, 1].

        Numbers in [-1, 1] have no variance outside of that (Bao et al. 2022, theorem 2); an estimate may, near
        t = T. The standard error is that of the mean before it is clipped.

        Raises:
            ValueError: one image, which has no spread to estimate an error from.
        """
        if len(per_image) < 2:
            raise ValueError(f"a variance with its standard error needs at least 2 images, not {len(per_image)}")
        per_image = np.asarray(per_image, np.float64)
        mean = np.clip(per_image.mean(axis=0), 0.0, 1.0)
        stderr = per_image.std(axis=0, ddof=1) / len(per_image) ** 0.5
        return cls(*(np.concatenate([[0.0], table]).astype(np.float32) for table in (mean, stderr)))


class X0Terms(NamedTuple):
    """Two unbiased estimates of Var(x_0 | x_t) per dimension that agree if the network is E[x_0 | x_t].

    analytic: (1 − ᾱ_t)/ᾱ_t · (1 − ‖ε̂‖²/d), from the size of the prediction alone; x̂_0 is not clipped, or its
        ε̂ would not be the conditional mean. Bao et al. (2022, Analytic-DPM), theorem 1.
    error: ‖x_0 − x̂_0‖²/d with x̂_0 as the reverse process takes it: the variance that this mean needs, perfect
        or not. Bao et al. (2022, "Estimating the optimal covariance with imperfect mean").
    """

    analytic: Float[Array, "..."]
    error: Float[Array, "..."]


class Split(NamedTuple):
    """One term of the bound in bits/dim, as a sum: KL(q ‖ p_θ) = variance mismatch + mean error for t > 1.

    decoder: L_0 at t = 1, else 0.
    mismatch: what the variance would cost with the posterior's own mean; 0 at t = 1.
    mean_error: what the mean costs at this variance, ‖μ̃ − μ_θ‖²/2σ²; 0 at t = 1.
    """

    decoder: Float[Array, "..."]
    mismatch: Float[Array, "..."]
    mean_error: Float[Array, "..."]


def save(directory: Path, analytic: X0Variance, error: X0Variance, step: int) -> None:
    """Writes x0_variance.npz: float32 [T + 1] tables of both estimates, and the checkpoint's step they belong to."""
    with files.replacing(directory / FILE) as file:
        np.savez(
            file,
            analytic=analytic.mean,
            analytic_stderr=analytic.stderr,
            error=error.mean,
            error_stderr=error.stderr,
            step=step,
        )


def load(directory: Path, step: int) -> X0Variance:
    """The analytic estimate of the checkpoint of `step`.

    Raises:
        FileNotFoundError: nothing was estimated yet.
        ValueError: what was estimated belongs to another checkpoint.
    """
    path = directory / FILE
    if not path.exists():
        raise FileNotFoundError(
            f"the optimal variance needs {path}, which python -m experiments.variance_accounting "
            f"--workdir={directory} writes"
        )
    with np.load(path) as saved:
        if saved["step"] != step:
            raise ValueError(f"{path} was estimated at step {saved['step']}, but the checkpoint is of step {step}")
        return X0Variance(saved["analytic"], saved["analytic_stderr"])


def interpolated(fraction: float) -> Variance:
    """log σ_t² at `fraction` of the way from log β̃_t (0: fixed_small) to log β_t (1: fixed_large)."""
    return Variance(
        lambda row, raw: jnp.full_like(raw, fraction * row.log_beta_large + (1 - fraction) * row.log_beta_tilde),
        is_learned=False,
    )


def x0_terms(
    denoise: Denoise,
    p: Reverse,
    schedule: Schedule,
    x0: Float[Array, "b h w c"],
    keys: Key[Array, " b"],
    clip_x0: bool = True,
) -> X0Terms:
    """Both estimates for every image and t, from one network pass each: leaves [B, T], entry t − 1 is t.

    Args:
        denoise: (x_t [B, H, W, C], network_t [B]) -> output.
        p: the reverse process; only its prediction matters.
        schedule: its T rows are scanned.
        x0: images in [-1, 1], of the training set: scoring test images with their own variance would flatter.
        keys: one per image.
        clip_x0: whether the reverse process clips x̂_0, which `error` follows.
    """

    def one(row: Schedule, x0: Array, x_t: Array, eps: Array, output: Array) -> X0Terms:
        x0_hat = p(row, x_t, output, clip_x0=False)[1]
        eps_hat = (x_t - row.sqrt_alpha_bar * x0_hat) / row.sqrt_one_minus_alpha_bar
        # 1 is E ε², and with this ε² in its place most of the noise cancels for large t, where ε̂ follows ε.
        unexplained = jnp.mean((eps - eps_hat) * (eps + eps_hat))
        mean_error = p(row, x_t, output, clip_x0)[0].mean - process.q_posterior(row, x0, x_t).mean
        error = jnp.mean((mean_error / row.posterior_x0) ** 2)
        # Where nothing of x_0 is left (ᾱ_T = 0) its ε̂ says nothing either.
        analytic = jnp.where(row.alpha_bar > 0, jnp.exp(-row.log_snr) * unexplained, error)
        return X0Terms(analytic, error)

    return over_all_t(denoise, schedule, x0, keys, one)


def split_terms_bpd(
    denoise: Denoise,
    p: Reverse,
    candidates: Mapping[str, Variance],
    schedule: Schedule,
    x0: Float[Array, "b h w c"],
    keys: Key[Array, " b"],
    num_levels: int = 256,
    clip_x0: bool = True,
) -> dict[str, Split]:
    """`likelihood.vlb_terms_bpd` under each candidate variance, split, from one network pass per image and t.

    The mean, the noise and x_t are the same for all candidates, so their differences are paired.

    Args:
        denoise: (x_t [B, H, W, C], network_t [B]) -> output.
        p: the reverse process that the network was trained for; its variance is replaced by each candidate.
        candidates: by name; learned ones read the network's second half, so they need a p of their own kind.
        schedule: its T rows are scanned.
        x0: images in [-1, 1], on their grey levels.
        keys: one per image.
        num_levels: how many grey levels the decoder distinguishes.
        clip_x0: clip x̂_0 to [-1, 1].

    Returns:
        For each candidate its Split with leaves [B, T], entry t − 1 is t; the sum of the three is the term.
    """

    def one(row: Schedule, x0: Array, x_t: Array, eps: Array, output: Array) -> dict[str, Split]:
        mean = p(row, x_t, output, clip_x0)[0].mean
        _, raw = p.split(output)
        posterior = process.q_posterior(row, x0, x_t)

        def split(log_var: Array) -> Split:
            p_prev, right_mean = Gaussian(mean, log_var), Gaussian(posterior.mean, log_var)
            decoder = -gaussian.discretized_log_prob(p_prev, x0, num_levels)
            mismatch, mean_error = gaussian.kl(posterior, right_mean), gaussian.kl(right_mean, p_prev)
            is_decoder = row.t == 1
            return Split(
                decoder=bits_per_dim(jnp.where(is_decoder, decoder, 0.0)),
                mismatch=bits_per_dim(jnp.where(is_decoder, 0.0, mismatch)),
                mean_error=bits_per_dim(jnp.where(is_decoder, 0.0, mean_error)),
            )

        # One program for all candidates: written out for each, it would take many times as long to compile.
        splits = jax.vmap(split)(jnp.stack([variance.log_var(row, raw) for variance in candidates.values()]))
        return {name: jax.tree.map(lambda leaf, k=k: leaf[k], splits) for k, name in enumerate(candidates)}

    return over_all_t(denoise, schedule, x0, keys, one)
