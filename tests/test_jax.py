"""The installed JAX: facts that the code relies on, and bugs that must not come back."""

import jax
import jax.numpy as jnp


def test_a_reduced_matrix_vector_product_is_right_under_vmap():
    """jax issue 39103: jax 0.10.2 returned 1.0654e9 on CPUs, with and without optimization."""
    i = jnp.arange(32_769, dtype=jnp.float32)
    rows = jnp.stack((i, jnp.zeros_like(i), jnp.zeros_like(i)), axis=1)
    squares = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(rows)
    assert squares[-1] == 32_768.0**2


def test_the_rbg_generator_does_not_keep_examples_apart_under_vmap():
    """Why dropout has a hash of its own. If this fails, the cheaper generator of JAX can replace it."""
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 3)
    drawn = jax.vmap(lambda key: jax.random.bits(key, (8,)))
    assert (drawn(keys)[0] == drawn(keys[:1])[0]).all(), "the first example is the one that is kept"
    assert (drawn(keys)[1] != drawn(keys[1:2])[0]).any()
