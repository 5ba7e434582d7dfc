"""Dropout's random bits: the published hash, and no pattern between positions, examples, steps and layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.networks.dropout import _mix, dropout, random_bits
from diffusion.runtime import randomness

SIZE = 2**18


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(rate):
    h = jnp.ones((4, 64, 64, 16))
    dropped = np.asarray(dropout(h, rate, jax.random.split(jax.random.key(10), 4)))
    standard_error = np.sqrt(rate * (1 - rate) / h.size)
    assert abs((dropped == 0).mean() - rate) < 4 * standard_error
    np.testing.assert_allclose(dropped[dropped > 0], 1 / (1 - rate), rtol=1e-6)  # float32


def test_the_mix_is_murmur3s():
    """MurmurHash3_x86_32 of no bytes is fmix32 of its seed; these are its published test vectors."""
    vectors = {0: 0, 1: 0x514E28B7, 0xFFFFFFFF: 0x81F16F39}
    np.testing.assert_array_equal(_mix(jnp.array(list(vectors), jnp.uint32)), list(vectors.values()))


def keys_of_steps() -> list:
    """Keys as training makes them: of two steps, two examples each, and of two layers of the first example."""
    steps = [jax.random.fold_in(randomness.stream(0, "train"), step) for step in range(2)]
    examples = [key for step in steps for key in randomness.per_item(step, jnp.arange(2))]
    return examples + [jax.random.fold_in(examples[0], layer) for layer in (1, 2)]


def test_every_byte_is_equally_frequent():
    """χ² over 256 values has 255 degrees of freedom: mean 255, deviation √510. 6 keys × 4 bytes, all within 4."""
    for key in keys_of_steps():
        for byte in np.asarray(random_bits(key, SIZE)).view(np.uint8).reshape(-1, 4).T:
            counts = np.bincount(byte, minlength=256)
            statistic = ((counts - SIZE / 256) ** 2 / (SIZE / 256)).sum()
            assert abs(statistic - 255) < 4 * np.sqrt(510)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """In standard errors of independent numbers."""
    return abs(np.corrcoef(a, b)[0, 1]) * np.sqrt(len(a))


@pytest.mark.parametrize("distance", [1, 2, 3, 32, 1024, 32 * 1024])
def test_positions_are_independent(distance):
    """Neighbours in channels, columns, rows, and far apart: as numbers and as what is dropped at a rate of 0.1."""
    for key in keys_of_steps():
        bits = np.asarray(random_bits(key, SIZE)).astype(np.float64)
        assert correlation(bits[:-distance], bits[distance:]) < 4
        dropped = bits < 0.1 * 2**32
        assert correlation(dropped[:-distance], dropped[distance:]) < 4


def test_examples_steps_and_layers_are_independent():
    drawn = [np.asarray(random_bits(key, SIZE)) for key in keys_of_steps()]
    for i, first in enumerate(drawn):
        for second in drawn[:i]:
            assert correlation(first, second) < 4
            assert correlation(first < 0.1 * 2**32, second < 0.1 * 2**32) < 4


def test_an_example_keeps_its_bits_whatever_stands_beside_it():
    keys = jax.random.split(jax.random.key(3), 4)
    h = jnp.ones((4, 8, 8, 2))
    together = dropout(h, 0.5, keys)
    for i in range(4):
        np.testing.assert_array_equal(together[i], dropout(h[:1], 0.5, keys[i : i + 1])[0])
