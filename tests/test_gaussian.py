"""Divergence, density and bin masses against float64 and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_ndtr

from diffusion import gaussian
from diffusion.gaussian import Gaussian


def normal(mean, log_var, shape=()):
    return Gaussian(jnp.full(shape, mean, jnp.float32), jnp.full(shape, log_var, jnp.float32))


def test_kl_is_the_expected_log_ratio():
    p, q = normal(0.3, -1.0), normal(-0.2, 0.5)
    x, step = jnp.linspace(-8, 8, 20001, dtype=jnp.float32), 16 / 20000

    def on_grid(g):
        return Gaussian(jnp.full_like(x, g.mean), jnp.full_like(x, g.log_var))

    log_p, log_q = gaussian.log_prob(on_grid(p), x), gaussian.log_prob(on_grid(q), x)
    np.testing.assert_allclose(gaussian.kl(p, q), jnp.sum(jnp.exp(log_p) * (log_p - log_q)) * step, rtol=1e-4)


def test_kl_of_equal_variances_is_a_distance_of_means():
    np.testing.assert_allclose(
        gaussian.kl(normal(0.7, -3.0), normal(0.2, -3.0)), 0.5**2 / (2 * np.exp(-3.0)), rtol=1e-6
    )


def test_kl_of_nearly_equal_variances_does_not_cancel():
    r = 1e-3  # to second order KL is r²/4; exp(r) − 1 − r in float32 would be 10% off
    exact = 0.5 * (np.expm1(r) - r)
    np.testing.assert_allclose(gaussian.kl(normal(0.0, r), normal(0.0, 0.0)), exact, rtol=1e-3)


@pytest.mark.parametrize("num_levels", [2, 17, 256])
@pytest.mark.parametrize("log_var", [-12.0, -6.0, 0.0, 4.0])
@pytest.mark.parametrize("mean", [-1.7, -1.0, 0.123, 0.9])
def test_bins_sum_to_one(num_levels, log_var, mean):
    levels = jnp.linspace(-1, 1, num_levels, dtype=jnp.float32)
    g = normal(mean, log_var, levels.shape)
    log_mass = gaussian.discretized_log_prob(g, levels, num_levels)
    # 256 bins, each to a relative float32 accuracy of about 2e-5 where the bin is far narrower than σ.
    np.testing.assert_allclose(jax.nn.logsumexp(log_mass), 0.0, atol=5e-5)


@pytest.mark.parametrize("num_levels", [17, 256])
def test_bin_masses_are_exact_in_both_tails(num_levels):
    levels = np.linspace(-1, 1, num_levels)
    for mean in (-3.0, -1.0, 0.2, 0.999, 2.5):
        for sigma in (0.005, 0.05, 0.7):
            g = normal(mean, 2 * np.log(sigma), levels.shape)
            ours = gaussian.discretized_log_prob(g, jnp.asarray(levels, jnp.float32), num_levels)
            np.testing.assert_allclose(ours, exact_log_mass(levels, mean, sigma), rtol=1e-4, atol=1e-4)


def exact_log_mass(levels, mean, sigma):
    """Φ(b) − Φ(a) in float64, from the side where it does not cancel."""
    half = 1 / (len(levels) - 1)
    low, high = (levels - half - mean) / sigma, (levels + half - mean) / sigma
    low[0], high[-1] = -np.inf, np.inf
    flip = low > 0
    low, high = np.where(flip, -high, low), np.where(flip, -low, high)
    return log_ndtr(high) + np.log(-np.expm1(log_ndtr(low) - log_ndtr(high)))


def test_gradients_are_finite_everywhere():
    levels = jnp.linspace(-1, 1, 256, dtype=jnp.float32)
    for log_var in (-20.0, -9.0, 0.0, 5.0):
        for mean in (-30.0, -1.0, 0.0, 1.0, 30.0):
            g = normal(mean, log_var, levels.shape)
            gradient = jax.grad(lambda g: gaussian.discretized_log_prob(g, levels).sum())(g)
            assert all(np.isfinite(leaf).all() for leaf in gradient), (log_var, mean)


def test_sampling_has_the_mean_and_the_variance():
    g = normal(0.5, np.log(4.0), (100_000,))
    x = g.sample(jax.random.normal(jax.random.key(0), (100_000,)))
    np.testing.assert_allclose(x.mean(), 0.5, atol=4 * 2 / 100_000**0.5)  # 4 standard errors
    np.testing.assert_allclose(x.var(), 4.0, rtol=4 * (2 / 100_000) ** 0.5)
