"""`if_any`: nothing is computed for a batch in which no example needs it."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.batching import if_any


def test_what_no_example_needs_is_not_computed():
    """Under vmap `lax.cond` alone would compute it for all."""
    calls = []

    def compute():
        jax.debug.callback(lambda: calls.append(1))
        return jnp.full(3, 7.0)

    found = jax.jit(jax.vmap(lambda t: if_any(t == 1, compute)))
    later = found(jnp.array([2, 3, 4, 10]))
    jax.effects_barrier()
    assert not calls and not later.any()
    np.testing.assert_array_equal(found(jnp.array([2, 1])), np.full((2, 3), 7.0))
    jax.effects_barrier()
    assert calls
