"""The stack of bits: pushed integers come back, and cost what their probabilities say."""

import math

import numpy as np
import pytest
from scipy import stats

from diffusion import gaussian
from diffusion.ans import MAX_INTEGER, Stack


def random_stack(num_words=2000, seed=0):
    return Stack(np.random.default_rng(seed).integers(1, 2**32, num_words, np.uint32))


def bits(stack):
    """The height in bits, as a real number."""
    *_, second, first = stack.words().tolist()
    return 32 * (stack.num_words - 1) + math.log2(first + second / 2**32)


def test_a_pop_draws_from_its_gaussian_and_its_push_restores_the_bits():
    stack, mean = random_stack(), np.full(5000, 3.7)
    words = stack.words()
    drawn = stack.pop_inside(mean, 8.0, 48)
    assert abs(drawn - 3.7).max() <= 48.3
    assert drawn.mean() == pytest.approx(3.7, abs=4 * 8 / 5000**0.5)
    assert drawn.std() == pytest.approx(math.sqrt(64 + 1 / 12), rel=0.04)
    stack.push_inside(drawn, mean, 8.0, 48)
    np.testing.assert_array_equal(stack.words(), words)


@pytest.mark.parametrize("std", [0.3, 2.0, 9.5])
def test_a_push_costs_the_mass_of_the_bin(std):
    rng, stack = np.random.default_rng(0), random_stack()
    mean = rng.normal(0, 30, 2000)
    integers = np.rint(rng.normal(mean, std)).astype(np.int64)
    before, window = bits(stack), math.ceil(6 * std)
    stack.push(integers, mean, np.full(2000, std), window)
    low, high = stats.norm.cdf((integers - mean - 0.5) / std), stats.norm.cdf((integers - mean + 0.5) / std)
    leak = 2000 * 1.45 * (2 * window + 3) / 2**24
    assert bits(stack) - before == pytest.approx(-np.log2(high - low).sum(), abs=leak + 0.1)
    np.testing.assert_array_equal(stack.pop(mean, np.full(2000, std), window), integers)


def test_an_integer_anywhere_comes_back_and_costs_little_more_than_the_logarithm_of_its_distance():
    far = np.array([0, 49, -49, 50, 51, 1000, -70_000, MAX_INTEGER, -MAX_INTEGER])
    for mean in (0.3, -20.0, 1e5, -1e30):
        stack = random_stack()
        words, means, stds = stack.words(), np.full(len(far), mean), np.full(len(far), 8.0)
        stack.push(far, means, stds, 48)
        assert 32 * (stack.num_words - len(words)) <= len(far) * (24 + 5 + 23) + 64
        np.testing.assert_array_equal(stack.pop(means, stds, 48), far)
        np.testing.assert_array_equal(stack.words(), words)
    with pytest.raises(ArithmeticError, match="steps of the grid"):
        stack.push(np.array([MAX_INTEGER + 1]), np.zeros(1), np.ones(1), 6)


def test_pixel_values_cost_what_the_decoder_of_eq_13_says():
    rng, stack, num_levels = np.random.default_rng(1), random_stack(), 17
    levels = rng.integers(0, num_levels, 3000).astype(np.uint8)
    levels[:500], levels[500:1000] = 0, num_levels - 1  # the open bins
    mean = np.where(levels == 0, -2.0, np.where(levels == 16, 19.0, levels + rng.normal(0, 1, 3000)))
    before = bits(stack)
    stack.push_levels(levels, mean, np.full(3000, 1.5), num_levels)
    in_unit = gaussian.Gaussian(np.float32(mean / 8 - 1), np.full(3000, 2 * math.log(1.5 / 8), np.float32))
    nats = -gaussian.discretized_log_prob(in_unit, np.float32(levels / 8 - 1), num_levels)
    assert bits(stack) - before == pytest.approx(float(nats.sum()) / math.log(2), abs=0.2)
    np.testing.assert_array_equal(stack.pop_levels(mean, np.full(3000, 1.5), num_levels), levels)


def test_a_symbol_costs_what_its_row_of_probabilities_says_and_an_impossible_one_24_bits():
    rng, stack = np.random.default_rng(1), random_stack()
    probs = rng.dirichlet(np.full(17, 0.3), 3000)
    symbols = np.array([rng.choice(17, p=row) for row in probs], np.uint8)
    impossible = rng.permutation(3000)[:10]
    probs[impossible, symbols[impossible]] = 0
    probs = np.float32(probs / probs.sum(-1, keepdims=True))
    before, words = bits(stack), stack.words()
    stack.push_categorical(symbols, probs)
    of_symbols = np.maximum(np.float64(probs[np.arange(3000), symbols]), 2.0**-24)
    assert bits(stack) - before == pytest.approx(-np.log2(of_symbols).sum(), abs=0.2)
    np.testing.assert_array_equal(stack.pop_categorical(probs), symbols)
    np.testing.assert_array_equal(stack.words(), words)


def test_a_number_costs_the_logarithm_of_how_many_there_are():
    stack = random_stack()
    before = bits(stack)
    for number in (0, 2, 3):
        stack.push_number(number, 4)
    stack.push_number(0, 1)
    assert bits(stack) - before == pytest.approx(6, abs=1e-3)
    assert [stack.pop_number(1)] + [stack.pop_number(4) for _ in range(3)] == [0, 3, 2, 0]


def test_it_says_how_low_it_has_been_and_refuses_to_run_empty():
    stack = random_stack(20)
    drawn = stack.pop_inside(np.zeros(40), 100.0, 600)
    height = stack.num_words
    stack.push_inside(drawn, np.zeros(40), 100.0, 600)
    assert stack.take_lowest() == height < 20 == stack.take_lowest()
    with pytest.raises(ArithmeticError, match="a latent lies outside the range of this code"):
        stack.push_inside(drawn + 2000, np.zeros(40), 100.0, 600)
    with pytest.raises(ArithmeticError, match="ran empty"):
        stack.pop_inside(np.zeros(80), 100.0, 600)
