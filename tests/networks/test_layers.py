"""The parts of networks against their formulas in float64: embeddings, group norm, attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.networks.layers import Attention, Dense, GroupNorm, fourier_features, time_embedding


def test_time_embedding_is_the_formula_in_float64():
    network_t, half = np.array([0, 1, 17, 500, 999]), 64
    frequencies = 10.0 ** (-4 * np.arange(half, dtype=np.float64) / (half - 1))
    angles = np.array([[t * f for f in frequencies] for t in network_t])
    expected = np.hstack([np.sin(angles), np.cos(angles)])
    for dtype in (jnp.int32, jnp.float32):
        embedding = time_embedding(jnp.asarray(network_t, dtype), 2 * half)
        np.testing.assert_allclose(embedding, expected, atol=2e-4)  # 999 times a float32 rounding


def test_fourier_features_separate_neighbouring_pixel_values():
    levels = jnp.array([-1.0, -0.875, 0.5]).reshape(1, 3, 1, 1)
    features = fourier_features(levels, (2, 3))[0, :, 0]
    np.testing.assert_allclose(features[:, 0], [-1.0, -0.875, 0.5])
    expected = [[0, 1, 0, 1], [1, 0, 0, -1], [0, 1, 0, 1]]  # sin 4 pi x, cos 4 pi x, sin 8 pi x, cos 8 pi x
    np.testing.assert_allclose(features[:, 1:], expected, atol=1e-5)


def test_group_norm_is_exact_where_the_mean_is_large():
    h = 1000.0 + jax.random.normal(jax.random.key(3), (1, 4, 4, 4))
    normed = GroupNorm(2).apply({"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}, h)
    groups = np.float64(h).reshape(16, 2, 2)
    deviation = groups - groups.mean((0, 2), keepdims=True)
    expected = deviation / np.sqrt(groups.var((0, 2), keepdims=True) + 1e-6)
    np.testing.assert_allclose(np.asarray(normed).reshape(16, 2, 2), expected, atol=2e-3)


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_group_norm_adds_its_eps_to_the_variance(eps):
    h = 1e-3 * jax.random.normal(jax.random.key(3), (1, 4, 4, 4))  # of a variance like eps
    normed = GroupNorm(2, eps).apply({"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}, h)
    groups = np.float64(h).reshape(16, 2, 2)
    deviation = groups - groups.mean((0, 2), keepdims=True)
    expected = deviation / np.sqrt(groups.var((0, 2), keepdims=True) + eps)
    np.testing.assert_allclose(np.asarray(normed).reshape(16, 2, 2), expected, atol=1e-5)


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


def test_attention_is_equivariant_under_permutations_of_positions_and_equals_its_definition():
    h = jax.random.normal(jax.random.key(2), (1, 2, 3, 8))
    attention = Attention(num_groups=2, num_heads=2, dtype="float32")
    shapes = jax.eval_shape(lambda: attention.init(jax.random.key(0), h))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: np.float32(rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[0])), shapes)
    output = attention.apply({"params": params}, h)
    order = jnp.array([4, 2, 0, 5, 1, 3])
    permuted = attention.apply({"params": params}, h.reshape(1, 6, 8)[:, order].reshape(h.shape))
    np.testing.assert_allclose(permuted.reshape(6, 8), output.reshape(6, 8)[order], atol=1e-5)

    def dense(name, value):
        return value @ np.float64(params[name]["kernel"]) + np.float64(params[name]["bias"])

    groups = np.float64(h).reshape(6, 2, 4)
    normed = (groups - groups.mean((0, 2), keepdims=True)) / np.sqrt(groups.var((0, 2), keepdims=True) + 1e-6)
    normed = normed.reshape(6, 8) * params["norm"]["scale"] + params["norm"]["bias"]
    query, key, value = (dense(name, normed).reshape(6, 2, 4) for name in ("query", "key", "value"))
    attended = np.empty((6, 2, 4))
    for head in range(2):
        for position in range(6):
            weights = np.exp(key[:, head] @ query[position, head] / np.sqrt(4))
            attended[position, head] = weights @ value[:, head] / weights.sum()
    expected = np.float64(h).reshape(6, 8) + dense("projection", attended.reshape(6, 8))
    np.testing.assert_allclose(output.reshape(6, 8), expected, atol=1e-5)


def test_a_dense_layer_of_a_map_acts_on_each_pixel_and_its_kernel_gradient_transposes_no_map():
    rng = np.random.default_rng(0)
    h, g = np.float32(rng.normal(size=(2, 4, 6, 5))), np.float32(rng.normal(size=(2, 4, 6, 7)))
    params = {"kernel": np.float32(rng.normal(size=(5, 7))), "bias": np.float32(rng.normal(size=7))}

    def apply(params, h):
        return Dense(7).apply({"params": params}, h)

    output, pull_back = jax.vjp(apply, params, h)
    gradient, of_h = pull_back(g)
    np.testing.assert_allclose(output, np.float64(h) @ params["kernel"] + params["bias"], atol=1e-5)
    np.testing.assert_allclose(of_h, np.float64(g) @ params["kernel"].T, atol=1e-5)
    np.testing.assert_allclose(gradient["kernel"], np.einsum("bhwc,bhwf->cf", np.float64(h), g), atol=1e-4)
    # A transposed map would have the channels first, and 2 * 4 * 6 pixels.
    program = jax.jit(jax.grad(lambda params, h: jnp.sin(apply(params, jnp.cos(h))).sum())).lower(params, h).compile()
    assert "f32[48,7]" in program.as_text() and "f32[7,48]" not in program.as_text()
