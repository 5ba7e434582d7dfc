"""Winograd's convolution equals the convolution: value, both modes of differentiation, vmap; where networks use it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from diffusion.networks import convolution
from diffusion.networks.layers import CONVOLUTIONS
from diffusion.networks.unet import UNet

SAME = ((1, 1), "SAME")
DIMENSIONS = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def reference(x, kernel):
    return lax.conv_general_dilated(x, kernel, *SAME, **DIMENSIONS)


def inputs(height: int = 8, width: int = 10, channels: int = 16, features: int = 24, batch: int = 2):
    keys = jax.random.split(jax.random.key(0), 5)
    x, g = (
        jax.random.normal(key, (batch, height, width, n)) for key, n in zip(keys[:2], (channels, features), strict=True)
    )
    kernel = jax.random.normal(keys[2], (3, 3, channels, features))
    return x, kernel, g, jax.random.normal(keys[3], x.shape), jax.random.normal(keys[4], kernel.shape)


def close(found, wanted):
    # Sums over up to 2·8·10 pixels or 9·24 products of unit normals, in another order: 1e-6 of their size.
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * np.abs(b).max())


# Below 64 channels the convolution itself is XLA's, and only the gradient in the kernel is Winograd's.
SHAPES = [(8, 10, 16, 24), (2, 4, 2, 5), (2, 2, 1, 1), (2, 2, 64, 64), (4, 6, 64, 64, 3)]
SHAPES += [(6, 8, 64, 80), (6, 8, 80, 64)]  # the narrow factor comes first in a product


@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_both_gradients_are_those_of_the_convolution(shape):
    x, kernel, g, *_ = inputs(*shape)
    value, pull_back = jax.vjp(convolution.conv_3x3, x, kernel)
    expected, pull_back_by_xla = jax.vjp(reference, x, kernel)
    close((value, pull_back(g)), (expected, pull_back_by_xla(g)))


def test_the_error_is_a_few_roundings():
    """In float64: Winograd's sums of four pixels cost some of the last bits, and no more."""
    x, kernel, *_ = inputs(8, 8, 128, 64)
    padded = np.pad(np.float64(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [padded[:, i : i + 8, j : j + 8] @ np.float64(kernel)[i, j] for i in range(3) for j in range(3)]
    error = np.asarray(convolution.conv_3x3(x, kernel)) - sum(taps)
    scale = np.sqrt(9 * 128)  # of an output, a sum of so many products of unit normals
    assert np.sqrt(np.mean(error**2)) < 1e-6 * scale
    assert np.abs(error).max() < 1e-5 * scale


@pytest.mark.parametrize("shape", [(8, 10, 16, 24), (4, 6, 64, 64)])
def test_forward_mode_and_second_derivatives(shape):
    x, kernel, g, x_dot, kernel_dot = inputs(*shape)
    primals, tangents = (x, kernel), (x_dot, kernel_dot)
    close(jax.jvp(convolution.conv_3x3, primals, tangents), jax.jvp(reference, primals, tangents))

    def slope(conv):
        return jax.grad(lambda x, kernel: jnp.vdot(g, jnp.tanh(conv(x, kernel) / 12)), argnums=(0, 1))

    def twice(conv):
        """Reverse mode over reverse mode: how a learned schedule is trained."""

        def along_tangents(x, kernel):
            return sum(jnp.vdot(a, b) for a, b in zip(slope(conv)(x, kernel), tangents, strict=True))

        return jax.grad(along_tangents, argnums=(0, 1))

    close(jax.jvp(slope(convolution.conv_3x3), primals, tangents)[1], jax.jvp(slope(reference), primals, tangents)[1])
    close(twice(convolution.conv_3x3)(*primals), twice(reference)(*primals))
    for derivative in (slope, twice):
        assert "scatter" not in jax.jit(derivative(convolution.conv_3x3)).lower(*primals).as_text()


@pytest.mark.parametrize("shape", [(8, 10, 16, 24), (4, 6, 64, 64)])
def test_vmap_over_examples_and_over_kernels(shape):
    x, kernel, *_ = inputs(*shape)
    examples = jnp.stack([x, 2 * x])
    expected = jnp.stack([reference(x, kernel), reference(2 * x, kernel)])
    close(jax.vmap(lambda x: convolution.conv_3x3(x, kernel))(examples), expected)
    kernels = jnp.stack([kernel, 2 * kernel])

    def gradients(conv):
        return jax.vmap(jax.grad(lambda kernel: jnp.sin(conv(x, kernel)).sum()))(kernels)

    close(gradients(convolution.conv_3x3), gradients(reference))


@pytest.mark.parametrize(
    ("shape", "strides", "padding", "kernel_size"),
    [
        ((2, 16, 16, 64), (2, 2), ((0, 1), (0, 1)), 3),
        ((2, 16, 16, 64), (1, 1), "SAME", 1),
        ((1, 16, 16, 64), (1, 1), "SAME", 3),
        ((2, 16, 7, 64), (1, 1), "SAME", 3),
        ((2, 16, 16, 3), (1, 1), "SAME", 3),
    ],
)
def test_other_convolutions_are_left_to_xla(shape, strides, padding, kernel_size):
    x, kernel = jnp.zeros(shape), jnp.zeros((kernel_size, kernel_size, shape[-1], 64))
    assert primitives(x, kernel, strides, padding) == ["conv_general_dilated"]


@pytest.mark.parametrize("settings", [{"kernel_dilation": 2}, {"feature_group_count": 2}])
def test_dilated_and_grouped_convolutions_are_what_flax_makes_of_them(settings):
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 64))
    found, params = CONVOLUTIONS["winograd"](64, **settings).init_with_output(jax.random.key(1), x)
    close(found, nn.Conv(64, (3, 3), **settings).apply(params, x))


def test_only_float32_is_done_by_winograd():
    x, kernel = jnp.zeros((2, 16, 16, 64)), jnp.zeros((3, 3, 64, 64))
    assert primitives(x, kernel, *SAME) == ["conv_3x3"]
    assert primitives(jnp.zeros((3, 16, 16, 64)), kernel, *SAME) == ["conv_3x3"]
    assert primitives(x.astype("bfloat16"), kernel.astype("bfloat16"), *SAME) == ["conv_general_dilated"]


@pytest.mark.parametrize(("convolution", "by_winograd"), [("xla", 0), ("winograd", 25)])
def test_a_network_s_field_says_what_computes_its_convolutions(convolution, by_winograd):
    """All but the first and the last, which are narrow, and the strided one."""
    unet = UNet(channels=16, channel_mult=(1, 2), num_groups=4, attention_resolutions=(), convolution=convolution)
    x, t = jnp.zeros((2, 4, 4, 3)), jnp.zeros(2)
    params = jax.eval_shape(unet.init, jax.random.key(0), x, t)
    made = str(jax.make_jaxpr(unet.apply)(params, x, t))
    assert made.count("= conv_3x3 ") == by_winograd


@pytest.mark.parametrize("gradient", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_both_convolutions_are_one_network(gradient):
    unet = UNet(channels=16, channel_mult=(1, 2), num_groups=4, attention_resolutions=(), num_res_blocks=1)
    x, t = jax.random.normal(jax.random.key(0), (2, 4, 4, 3)), jnp.arange(2)
    params = jax.tree.map(jnp.ones_like, jax.eval_shape(unet.init, jax.random.key(1), x, t))
    params = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape) / 10, params)

    def output(unet):
        def scalar(params):
            return jnp.sum(jnp.sin(unet.apply(params, x, t)))

        return jax.jit(jax.grad(scalar) if gradient else scalar)(params)

    for a, b in zip(*(jax.tree.leaves(output(unet.copy(convolution=name))) for name in CONVOLUTIONS), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def primitives(x, kernel, *settings):
    made = jax.make_jaxpr(lambda x: convolution.winograd(x, kernel, *settings, **DIMENSIONS))(x)
    return [equation.primitive.name for equation in made.eqns]


@pytest.mark.parametrize(("channels", "convolutions"), [(16, 2), (64, 0)])
def test_what_is_left_of_xlas_convolutions(channels, convolutions):
    """The products are in calls, or XLA would fuse the gathers with what is around them and compute it many times."""
    x, kernel, g, *_ = inputs(16, 16, channels, channels + 8)

    def value_and_gradients(x, kernel, g):
        value, pull_back = jax.vjp(convolution.conv_3x3, x, kernel)
        return value, pull_back(g)

    lowered = jax.jit(value_and_gradients).lower(x, kernel, g)
    assert lowered.as_text().count("stablehlo.convolution") == convolutions
    calls = re.findall(r' call\(.*op_name="[^"]*jit\(_(?:conv|kernel_gradient)\)"', lowered.compile().as_text())
    assert len(calls) == 3
