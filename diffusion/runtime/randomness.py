"""Every random number is a pure function of (seed, stream, step or image, position): nothing is carried along.

So resuming needs the step and nothing else, and no two uses of one seed share their noise.
"""

import jax
from jaxtyping import Array, Int, Key

STREAMS = ("init", "train", "monitor", "eval", "sample", "variance")


def stream(seed: int | Int[Array, ""], name: str) -> Key[Array, ""]:
    """The key of one of the STREAMS."""
    return jax.random.fold_in(jax.random.key(seed), STREAMS.index(name))


def per_item(key: Key[Array, ""], items: Int[Array, " b"]) -> Key[Array, " b"]:
    """A key for each item (an image, a position in the batch), whatever batch it is part of."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, items)
