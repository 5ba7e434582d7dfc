"""Diagonal Gaussians: KL divergence, density, and the probability of one pixel value.

Everything is elementwise and in nats. `log_var` always has the mean's shape.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr
from jax.typing import ArrayLike
from jaxtyping import Float


class Gaussian(NamedTuple):
    """N(mean, exp(log_var)) with a diagonal covariance."""

    mean: Float[ArrayLike, "*shape"]
    log_var: Float[ArrayLike, "*shape"]

    def sample(self, noise: Float[ArrayLike, "*shape"]) -> Float[ArrayLike, "*shape"]:
        """mean + σ·noise, for standard normal noise."""
        return self.mean + jnp.exp(0.5 * self.log_var) * noise


def kl(p: Gaussian, q: Gaussian) -> Float[ArrayLike, "*shape"]:
    """KL(p ‖ q) of each element, in nats."""
    log_ratio = p.log_var - q.log_var
    # expm1(r) − r instead of exp(r) − 1 − r: the two variances are nearly equal for most t.
    return 0.5 * (jnp.expm1(log_ratio) - log_ratio + (p.mean - q.mean) ** 2 * jnp.exp(-q.log_var))


def log_prob(g: Gaussian, x: Float[ArrayLike, "*shape"]) -> Float[ArrayLike, "*shape"]:
    """log N(x; mean, σ²) of each element, in nats."""
    return -0.5 * (math.log(2 * math.pi) + g.log_var + (x - g.mean) ** 2 * jnp.exp(-g.log_var))


def discretized_log_prob(
    g: Gaussian, x: Float[ArrayLike, "*shape"], num_levels: int = 256
) -> Float[ArrayLike, "*shape"]:
    """log of the Gaussian's mass on the bin around each pixel value of x, in nats.

    The levels are −1, …, 1 in steps of 2/(num_levels − 1); a bin reaches half a step to either side. The outermost bins
    are open, so the masses sum to one. Source: Ho et al. (2020), eq. 13.

    Args:
        g: the decoder's Gaussian.
        x: data on the levels, in [-1, 1].
        num_levels: how many pixel values there are (256 for photographs).
    """
    half_bin = 1.0 / (num_levels - 1)
    inv_sigma = jnp.exp(-0.5 * g.log_var)
    low = (x - g.mean - half_bin) * inv_sigma
    high = (x - g.mean + half_bin) * inv_sigma
    lowest, highest = x < -1 + half_bin, x > 1 - half_bin
    # By symmetry Φ(high) − Φ(low) = Φ(−low) − Φ(−high). In the lower tail log Φ keeps its relative accuracy,
    # in the upper one Φ rounds to 1 and the difference to 0, so work on the side where both are negative.
    # An outermost bin is all of the tail on its own side.
    upper_tail = jnp.where(lowest, False, jnp.where(highest, True, x > g.mean))
    near, far = jnp.where(upper_tail, -low, high), jnp.where(upper_tail, -high, low)
    log_near, log_far = log_ndtr(near), log_ndtr(far)
    is_open = lowest | highest
    # Where the bin is open its gradient must not be NaN.
    return log_near + jnp.where(is_open, 0.0, log1mexp(jnp.where(is_open, 1.0, log_near - log_far)))


def levels_log_prob(
    g: Gaussian, x: Float[ArrayLike, "*shape"], num_levels: int = 256
) -> Float[ArrayLike, "*shape"]:
    """log p(x) in nats, where the probability of a pixel value is proportional to the Gaussian's density there.

    Kingma et al. (2021, VDM), section 3.3: with g = N(x_1/√ᾱ_1, (1 − ᾱ_1)/ᾱ_1) this is p(x_0 | x_1) by Bayes' rule, if
    all pixel values are equally likely.

    Args: as in `discretized_log_prob`.
    """
    levels = jnp.linspace(-1.0, 1.0, num_levels, dtype=x.dtype)
    inv_sigma = jnp.exp(-0.5 * g.log_var)

    def log_density(level):
        return -0.5 * ((level - g.mean) * inv_sigma) ** 2

    each = jax.vmap(log_density)(levels)
    return log_density(x) - jax.nn.logsumexp(each, axis=0)


def tanh_discretized_log_prob(
    g: Gaussian, x: Float[ArrayLike, "*shape"], num_levels: int = 256
) -> Float[ArrayLike, "*shape"]:
    """`discretized_log_prob` as the original code of Ho et al. (2020) computes it, to compare with its numbers.

    Φ(z) is approximated by ½(1 + tanh(√(2/π)(z + 0.044715 z³))), with an error of up to 2e-4. Masses below 1e-12 count
    as 1e-12, so an outlier costs at most 40 bits. In float32 the mass of an inner bin is a difference of numbers near
    1, so it is a multiple of 2⁻²⁵. Masses some 5σ away are therefore rounded or clamped.
    """
    half_bin = 1.0 / (num_levels - 1)
    inv_sigma = jnp.exp(-0.5 * g.log_var)
    cdf_low = _tanh_cdf((x - g.mean - half_bin) * inv_sigma)
    cdf_high = _tanh_cdf((x - g.mean + half_bin) * inv_sigma)
    lowest, highest = x < -1 + half_bin, x > 1 - half_bin
    mass = jnp.where(lowest, cdf_high, jnp.where(highest, 1.0 - cdf_low, cdf_high - cdf_low))
    return jnp.log(jnp.maximum(mass, 1e-12))


def _tanh_cdf(z: Float[ArrayLike, "*shape"]) -> Float[ArrayLike, "*shape"]:
    y = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
    # Close to ±1, XLA's tanh errs by a few roundings, as much as the masses there. This form does not.
    below_one = 2.0 / (jnp.exp(2.0 * jnp.abs(y)) + 1.0)
    return 0.5 * (1.0 + jnp.sign(y) * (1.0 - below_one))


def log1mexp(d: Float[ArrayLike, "*shape"]) -> Float[ArrayLike, "*shape"]:
    """log(1 − exp(−d)) for d > 0, accurate at both ends (Mächler 2012)."""
    d = jnp.maximum(d, jnp.finfo(d.dtype).tiny)
    is_small = d < math.log(2)
    # Each branch sees only its own arguments, or the gradient of the branch not taken would be NaN.
    small, large = jnp.where(is_small, d, 1.0), jnp.where(is_small, 1.0, d)
    return jax.lax.select(is_small, jnp.log(-jnp.expm1(-small)), jnp.log1p(-jnp.exp(-large)))
