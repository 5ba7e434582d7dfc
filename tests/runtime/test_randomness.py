"""Random numbers are functions of seed, stream and item, and no two uses share theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.runtime import randomness


def test_no_seed_stream_or_item_shares_its_key():
    keys = [
        randomness.per_item(randomness.stream(seed, name), jnp.arange(20))
        for seed in (0, 1, 2**31 - 1)
        for name in randomness.STREAMS
    ]
    data = np.concatenate([jax.random.key_data(key) for key in keys])
    assert len(np.unique(data, axis=0)) == len(data)


def test_an_item_keeps_its_key_in_any_batch_and_under_jit():
    key = randomness.stream(3, "eval")
    alone = randomness.per_item(key, jnp.asarray([7]))
    batch = jax.jit(lambda seed: randomness.per_item(randomness.stream(seed, "eval"), jnp.asarray([2, 7, 9])))(3)
    np.testing.assert_array_equal(jax.random.key_data(batch)[1:2], jax.random.key_data(alone))


def test_a_stream_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError):
        randomness.stream(0, "evaluation")
