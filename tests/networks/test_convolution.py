"""The convolution with a gradient of its own is the convolution: value, both modes of differentiation, vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from diffusion.networks import layers

SAME = ((1, 1), "SAME")
DIMENSIONS = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def reference(x, kernel):
    return lax.conv_general_dilated(x, kernel, *SAME, **DIMENSIONS)


def inputs(height: int = 8, width: int = 10, channels: int = 16, features: int = 24):
    keys = jax.random.split(jax.random.key(0), 5)
    x, g = (
        jax.random.normal(key, (2, height, width, n)) for key, n in zip(keys[:2], (channels, features), strict=True)
    )
    kernel = jax.random.normal(keys[2], (3, 3, channels, features))
    return x, kernel, g, jax.random.normal(keys[3], x.shape), jax.random.normal(keys[4], kernel.shape)


def close(found, wanted):
    # Sums over up to 2·8·10 pixels or 9·24 products of unit normals, in another order: 1e-6 of their size.
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * np.abs(b).max())


@pytest.mark.parametrize("shape", [(8, 10, 16, 24), (1, 3, 2, 5), (5, 1, 3, 2), (1, 1, 1, 1)])
def test_both_gradients_are_those_of_the_convolution(shape):
    x, kernel, g, *_ = inputs(*shape)
    close(jax.vjp(layers.conv_3x3, x, kernel)[1](g), jax.vjp(reference, x, kernel)[1](g))


def test_forward_mode_and_second_derivatives():
    x, kernel, g, x_dot, kernel_dot = inputs()
    primals, tangents = (x, kernel), (x_dot, kernel_dot)
    close(jax.jvp(layers.conv_3x3, primals, tangents), jax.jvp(reference, primals, tangents))

    def slope(conv):
        return jax.grad(lambda x, kernel: jnp.vdot(g, jnp.tanh(conv(x, kernel) / 12)), argnums=(0, 1))

    close(jax.jvp(slope(layers.conv_3x3), primals, tangents)[1], jax.jvp(slope(reference), primals, tangents)[1])


def test_vmap_over_examples_and_over_kernels():
    x, kernel, *_ = inputs()
    close(jax.vmap(lambda one: layers.conv_3x3(one[None], kernel)[0])(x), reference(x, kernel))
    kernels = jnp.stack([kernel, 2 * kernel])

    def gradients(conv):
        return jax.vmap(jax.grad(lambda kernel: jnp.sin(conv(x, kernel)).sum()))(kernels)

    close(gradients(layers.conv_3x3), gradients(reference))


@pytest.mark.parametrize("strides, padding, kernel_size", [((2, 2), ((0, 1), (0, 1)), 3), ((1, 1), "SAME", 1)])
def test_other_convolutions_are_left_to_xla(strides, padding, kernel_size):
    x, kernel, *_ = inputs(16, 16)
    kernel = kernel[:kernel_size, :kernel_size]
    made = jax.make_jaxpr(lambda x: layers.conv_general_dilated(x, kernel, strides, padding, **DIMENSIONS))(x)
    assert [equation.primitive.name for equation in made.eqns] == ["conv_general_dilated"]


def test_on_cpus_the_weight_gradient_is_one_product_and_no_convolution(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    x, kernel, g, *_ = inputs(16, 16)

    def gradient(kernel, g):
        return jax.vjp(lambda kernel: layers.conv_general_dilated(x, kernel, *SAME, **DIMENSIONS), kernel)[1](g)

    hlo = jax.jit(gradient).lower(kernel, g).as_text()
    assert hlo.count("stablehlo.dot_general") == 1
    assert "stablehlo.convolution" not in hlo


def test_accelerators_keep_their_own_gradient(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x, kernel, *_ = inputs(16, 16)
    made = jax.make_jaxpr(lambda x: layers.conv_general_dilated(x, kernel, *SAME, **DIMENSIONS))(x)
    assert [equation.primitive.name for equation in made.eqns] == ["conv_general_dilated"]
