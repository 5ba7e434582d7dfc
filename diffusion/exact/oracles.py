"""Data whose diffusion is known exactly: mixtures of Gaussians, of which one Gaussian is the simplest.

A mixture plus noise is again a mixture, so log p(x_t), its score and the moments of x_0 given x_t are finite sums in
any dimension. They replace a network (`Mixture.denoiser`). For one Gaussian the gap of the bound is known too. Such
data are continuous: their bound needs `decoder=oracles.continuous_decoder`, and x̂_0 must not be clipped.

All logarithms are in nats, summed over an example's dimensions.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from diffusion import gaussian
from diffusion.gaussian import Gaussian
from diffusion.reverse import VARIANCES, Reverse
from diffusion.schedules import Schedule

PRECISION = "highest"  # accelerators would round the factors of a float32 product to TensorFloat-32 or bfloat16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixture:
    """Σ_k w_k N(mean_k, diag var_k) over arrays of one shape, usually [H, W, C]."""

    weight: Float[ArrayLike, " k"]
    mean: Float[ArrayLike, "k *shape"]
    var: Float[ArrayLike, "k *shape"]

    def sample(self, key: Key[Array, ""]) -> Float[Array, "*shape"]:
        """One draw."""
        key_component, key_noise = jax.random.split(key)
        k = jax.random.categorical(key_component, jnp.log(self.weight))
        noise = jax.random.normal(key_noise, self.mean.shape[1:])
        return self.mean[k] + jnp.sqrt(self.var[k]) * noise

    def log_prob(self, x: Float[ArrayLike, "*shape"]) -> Float[Array, ""]:
        """log p(x)."""
        return jax.nn.logsumexp(self._joint(x))

    def score(self, x: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
        """∇ log p(x)."""
        responsibility = jax.nn.softmax(self._joint(x))
        return jnp.tensordot(responsibility, (self.mean - x[None]) / self.var, 1, precision=PRECISION)

    def diffused(self, log_snr: Float[ArrayLike, ""]) -> "Mixture":
        """The law of x_t = √ᾱ x_0 + √(1 − ᾱ) ε, where log ᾱ/(1 − ᾱ) is `log_snr`."""
        alpha_bar, one_minus_alpha_bar = jax.nn.sigmoid(log_snr), jax.nn.sigmoid(-log_snr)
        return Mixture(self.weight, jnp.sqrt(alpha_bar) * self.mean, alpha_bar * self.var + one_minus_alpha_bar)

    def posterior(
        self, log_snr: Float[ArrayLike, ""], x_t: Float[ArrayLike, "*shape"]
    ) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
        """E[x_0 | x_t] and Var(x_0 | x_t) of each element."""
        diffused = self.diffused(log_snr)
        responsibility = jax.nn.softmax(diffused._joint(x_t))
        gain = jnp.sqrt(jax.nn.sigmoid(log_snr)) * self.var / diffused.var
        means = self.mean + gain * (x_t[None] - diffused.mean)
        mean = jnp.tensordot(responsibility, means, 1, precision=PRECISION)
        within = self.var * jax.nn.sigmoid(-log_snr) / diffused.var
        total = within + (means - mean[None]) ** 2
        return mean, jnp.tensordot(responsibility, total, 1, precision=PRECISION)

    def eps(self, x_t: Float[ArrayLike, "*shape"], log_snr: Float[ArrayLike, ""]) -> Float[Array, "*shape"]:
        """E[ε | x_t] = −√(1 − ᾱ) ∇ log p(x_t), the optimal output of an ε-prediction network."""
        return -jnp.sqrt(jax.nn.sigmoid(-log_snr)) * self.diffused(log_snr).score(x_t)

    def denoiser(
        self, p: Reverse, schedule: Schedule
    ) -> Callable[[Float[Array, "b *shape"], Float[Array, " b"]], Float[Array, "b *shape_out"]]:
        """The exact denoiser as a function of (x_t, network_t), with network_t from the schedule's own table.

        Given x_t, every target of `reverse.PREDICTIONS` is affine in x_0, so its conditional mean is the target at
        E[x_0 | x_t]. With variance="learned" the second half is the logarithm of each element's exact
        Var(x_{t−1} | x_t) = β̃_t + (coefficient of x_0 in μ̃_t)² Var(x_0 | x_t).

        Raises:
            ValueError: another learned variance (learned_range, for example, cannot express every variance), or a
                schedule with an x0_scale, whose log SNR does not determine √ᾱ_t.
        """
        _check_no_scale(schedule)
        if p.learns_variance and p.variance != "learned":
            raise ValueError(f"an exact denoiser outputs a variance for variance='learned', not for {p.variance!r}")
        rows = schedule[1:]

        def one(x_t: Array, network_t: Array) -> Array:
            row = rows[jnp.searchsorted(rows.network_t, network_t)]
            x0, x0_var = self.posterior(row.log_snr, x_t)
            eps = (x_t - row.sqrt_alpha_bar * x0) / row.sqrt_one_minus_alpha_bar
            output = p.target(row, x0, x_t, eps)
            return jnp.concatenate([output, reverse_log_var(row, x0_var)], -1) if p.learns_variance else output

        return jax.vmap(one)

    def _joint(self, x: Float[ArrayLike, "*shape"]) -> Float[Array, " k"]:
        """log w_k N(x; mean_k, var_k)."""
        components = jax.vmap(lambda mean, var: gaussian.log_prob(Gaussian(mean, jnp.log(var)), x).sum())
        return jnp.log(self.weight) + components(self.mean, self.var)


def normal(mean: Float[ArrayLike, "*shape"], std: Float[ArrayLike, "*shape"]) -> Mixture:
    """N(mean, diag std²) as a mixture of one."""
    return Mixture(jnp.ones(1), jnp.asarray(mean)[None], jnp.asarray(std)[None] ** 2)


def reverse_log_var(row: Schedule, x0_var: Float[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    """log Var(x_{t−1} | x_t), given Var(x_0 | x_t). At t = 1 it is log Var(x_0 | x_1), because β̃_1 = 0."""
    return jnp.log(row.beta_tilde + row.posterior_x0**2 * x0_var)


def continuous_decoder(g: Gaussian, x: Float[ArrayLike, "*shape"], num_levels: int) -> Float[ArrayLike, "*shape"]:
    """The log density of x_0 given x_1, a replacement for `gaussian.discretized_log_prob`; `num_levels` is ignored."""
    return gaussian.log_prob(g, x)


class GaussianGap(NamedTuple):
    """E[bound] − E[−log p(x_0)] in nats, for Gaussian data and the exact mean. It equals KL(q ‖ p).

    prior: KL(q(x_T) ‖ N(0, I)).
    mismatch: entry t − 1 is KL(q(x_{t−1} | x_t) ‖ p(x_{t−1} | x_t)); the two Gaussians differ only in variance.
    """

    prior: Float[Array, ""]
    mismatch: Float[Array, " t"]


def _check_no_scale(schedule: Schedule) -> None:
    if schedule.x0_scale is not None:
        raise ValueError("a schedule with an x0_scale does not preserve the variance, as a mixture's formulas do")


def gaussian_gap_nats(data: Mixture, variance: str, schedule: Schedule) -> GaussianGap:
    """The gap of the bound of x_0 ~ N(m, diag s²) under a fixed variance or "learned", in closed form, for every T.

    By the chain rule KL(q(x_{0:T}) ‖ p(x_{0:T})) is the sum of these T + 1 terms. With v* the exact and v the model's
    variance, the term of a step is Σ ½(log(v/v*) + v*/v − 1) over the dimensions. It is 0 with "learned", where v = v*.

    Raises:
        ValueError: a mixture of more than one Gaussian, whose terms have no closed form, another learned variance, or a
            schedule with an x0_scale.
    """
    _check_no_scale(schedule)
    if len(data.weight) != 1:
        raise ValueError(f"the gap has a closed form for 1 Gaussian, not for a mixture of {len(data.weight)}")
    if VARIANCES[variance].is_learned and variance != "learned":
        raise ValueError(f"the gap is known for a fixed variance and for 'learned', not for {variance!r}")

    def mismatch(row: Schedule) -> Array:
        _, x0_var = data.posterior(row.log_snr, data.mean[0])  # for one Gaussian it is the same at every x_t
        exact = reverse_log_var(row, x0_var)
        log_var = VARIANCES[variance].log_var(row, exact)
        zero = jnp.zeros_like(exact)
        return gaussian.kl(Gaussian(zero, exact), Gaussian(zero, log_var)).sum()

    end = data.diffused(schedule.log_snr[-1])
    zero = jnp.zeros_like(end.mean[0])
    prior = gaussian.kl(Gaussian(end.mean[0], jnp.log(end.var[0])), Gaussian(zero, zero)).sum()
    return GaussianGap(prior, jax.vmap(mismatch)(schedule[1:]))
