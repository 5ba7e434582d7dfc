"""The installed JAX computes what it should: bugs that were met and must not come back with another version."""

import jax
import jax.numpy as jnp


def test_a_reduced_matrix_vector_product_is_right_under_vmap():
    """jax issue 39103: jax 0.10.2 returned 1.0654e9 on CPUs, with and without optimization."""
    i = jnp.arange(32_769, dtype=jnp.float32)
    rows = jnp.stack((i, jnp.zeros_like(i), jnp.zeros_like(i)), axis=1)
    squares = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(rows)
    assert squares[-1] == 32_768.0**2
