"""The group norm of the network against its formula in float64: its values and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.networks.unet import GroupNorm


def test_group_norm_is_exact_where_the_mean_is_large():
    h = 1000.0 + jax.random.normal(jax.random.key(3), (1, 4, 4, 4))
    normed = GroupNorm(2).apply({"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}, h)
    groups = np.float64(h).reshape(16, 2, 2)
    deviation = groups - groups.mean((0, 2), keepdims=True)
    expected = deviation / np.sqrt(groups.var((0, 2), keepdims=True) + 1e-6)
    np.testing.assert_allclose(np.asarray(normed).reshape(16, 2, 2), expected, atol=2e-3)


def test_gradient_of_group_norm_is_that_of_its_formula():
    """In float64: with u = g * scale / deviation and z the normed map, dh = u - mean(u) - z * mean(z * u)."""
    groups, shape, rng = 2, (2, 5, 3, 6), np.random.default_rng(0)
    h, cotangent = 30.0 + rng.standard_normal(shape), rng.standard_normal(shape)
    scale, bias = rng.standard_normal((2, 6))

    def mean(a: np.ndarray) -> np.ndarray:
        of_groups = a.reshape(2, 15, groups, 3).mean((1, 3))
        return np.repeat(of_groups, 3, axis=-1)[:, None, None]

    deviation = np.sqrt(mean(h**2) - mean(h) ** 2 + 1e-6)
    z = (h - mean(h)) / deviation
    u = cotangent * scale / deviation
    params = {"params": {"scale": jnp.float32(scale), "bias": jnp.float32(bias)}}
    normed, pull_back = jax.vjp(GroupNorm(groups).apply, params, jnp.float32(h))
    found, along_h = pull_back(jnp.float32(cotangent))
    np.testing.assert_allclose(normed, z * scale + bias, atol=2e-5)
    np.testing.assert_allclose(along_h, u - mean(u) - z * mean(z * u), atol=2e-5)
    np.testing.assert_allclose(found["params"]["scale"], (cotangent * z).sum((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(found["params"]["bias"], cotangent.sum((0, 1, 2)), atol=1e-5)
