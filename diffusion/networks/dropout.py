"""Dropout with cheap random bits: a hash of the position, keyed by the example.

`jax.random` draws from Threefry, which mixes 20 rounds for a number; dropout took eight times as long with it on CPUs.
For dropout, MurmurHash3's mix of the position is random enough (A. Appleby, 2011, "fmix32"), applied once for each word
of the key. JAX's other generator, rbg, is cheap too, but under vmap an example's numbers would depend on the rest of
its batch (tests/test_jax.py).
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt32


def dropout(h: Float[Array, "b h w c"], rate: float, keys: Key[Array, " b"]) -> Float[Array, "b h w c"]:
    """h with each number set to zero with probability `rate` and the others scaled to keep the mean. One key each."""
    threshold = min(round(rate * 2**32), 2**32 - 1)
    bits = jax.vmap(lambda key: random_bits(key, math.prod(h.shape[1:])))(keys).reshape(h.shape)
    return jnp.where(bits >= jnp.uint32(threshold), h / (1 - threshold / 2**32), 0).astype(h.dtype)


def random_bits(key: Key[Array, ""], size: int) -> UInt32[Array, " {size}"]:
    """32 bits for each of `size` positions. They depend only on the key and the position."""
    bits = jnp.arange(size, dtype=jnp.uint32)
    for word in jax.random.key_data(key):
        bits = _mix(bits ^ word)
    return bits


def _mix(bits: UInt32[Array, " n"]) -> UInt32[Array, " n"]:
    """fmix32: one to one, and each bit of the result depends on all bits."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
