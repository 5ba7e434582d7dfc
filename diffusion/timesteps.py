"""How training draws t: which term of the bound each example of a batch estimates.

Each function draws for the whole global batch, so the numbers do not depend on how devices share it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key


def uniform(key: Key[Array, ""], batch_size: int, num_steps: int) -> Int[Array, " b"]:
    """t ~ Uniform{1…T}, independently for each example. Ho et al. (2020), algorithm 1."""
    return jax.random.randint(key, (batch_size,), 1, num_steps + 1)


def low_discrepancy(key: Key[Array, ""], batch_size: int, num_steps: int) -> Int[Array, " b"]:
    """Evenly spaced t with one random offset: each t is uniform, and the batch's mean loss varies less.

    Source: Kingma et al. (2021, VDM), appendix I.1.
    """
    u = (jax.random.uniform(key) + jnp.arange(batch_size) / batch_size) % 1.0
    return jnp.minimum((u * num_steps).astype(jnp.int32) + 1, num_steps)


SAMPLERS = {"uniform": uniform, "low_discrepancy": low_discrepancy}
