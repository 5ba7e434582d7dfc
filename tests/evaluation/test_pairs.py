"""The loop over (image, t) pairs: a pair's value is its own, whatever is measured beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import likelihood
from diffusion.data.levels import to_unit
from diffusion.evaluation.pairs import ImageTimePairs, every_t
from diffusion.runtime import devices, randomness

SEED, NUMBERS = 3, np.array([29, 4, 17, 0, 11])


def terms_of(model):
    return likelihood.term_and_x0_mse(model.p, model.num_levels)


@pytest.fixture(scope="module")
def replicated(model):
    return devices.replicate(model)


@pytest.fixture(scope="module")
def table(replicated, source):
    """Every term of five images: leaves [5, 6], each of one batch."""
    pairs = ImageTimePairs(terms_of, SEED, batch_size=64)
    return pairs.all(replicated, source, NUMBERS, every_t(len(NUMBERS), 6), "test")


def test_every_t_is_1_to_T_for_each_image():
    np.testing.assert_array_equal(every_t(2, 3), [[1, 2, 3], [1, 2, 3]])


def test_the_values_are_those_of_over_all_t_with_each_image_s_own_key(model, source, table):
    key = jax.random.fold_in(randomness.stream(SEED, "eval"), source.split_number)
    keys = randomness.per_item(key, jnp.asarray(NUMBERS))
    x0 = to_unit(jnp.asarray(source.images(NUMBERS)), source.num_levels)
    wanted = likelihood.over_all_t(model.denoise, model.schedule, x0, keys, terms_of(model))
    for found, other in zip(table, wanted, strict=True):
        assert found.shape == (5, 6) and found.dtype == np.float64
        np.testing.assert_allclose(found, other, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 8, 13])
def test_neither_batch_size_nor_order_changes_a_value(replicated, source, table, batch_size):
    pairs = ImageTimePairs(terms_of, SEED, batch_size)
    rng = np.random.default_rng(batch_size)
    image = rng.permutation(len(NUMBERS))
    t = np.stack([rng.permutation(6) + 1 for _ in NUMBERS])
    found = pairs.all(replicated, source, NUMBERS[image], t, "test")
    for ours, whole in zip(found, table, strict=True):
        np.testing.assert_allclose(ours, whole[image[:, None], t - 1], rtol=1e-5)


def test_a_part_of_the_pairs_comes_once_each_and_with_its_numbers(replicated, source, table):
    wanted = np.array([28, 3, 9, 17, 22, 5, 0, 1, 2])
    pairs = ImageTimePairs(terms_of, SEED, batch_size=8)
    done, terms = [], []
    for numbers, (term, _) in pairs.some(replicated, source, NUMBERS, every_t(5, 6), wanted, "test"):
        done.append(numbers)
        terms.append(term)
    assert len(done) == 2  # 9 pairs, 8 at a time
    np.testing.assert_array_equal(np.concatenate(done), wanted)
    np.testing.assert_allclose(np.concatenate(terms), table[0].ravel()[wanted], rtol=1e-5)
    nothing = pairs.some(replicated, source, NUMBERS, every_t(5, 6), wanted[:0], "test")
    assert list(nothing) == []


def test_a_measure_may_be_any_tree_and_the_noise_belongs_to_seed_stream_split_image_and_t(replicated, source):
    def eps_of(model):
        return lambda row, x0, x_t, eps, output: {"t": row.t, "eps": eps}

    def noise(source=source, seed=SEED, **settings):
        pairs = ImageTimePairs(eps_of, seed, batch_size=8, **settings)
        return pairs.all(replicated, source, np.array([2, 5]), np.array([[4, 1, 4], [1, 4, 6]]), "test")

    first = noise()
    np.testing.assert_array_equal(first["t"], [[4, 1, 4], [1, 4, 6]])
    eps = first["eps"]
    assert eps.shape == (2, 3, 4, 4, 1)
    np.testing.assert_array_equal(eps[0, 0], eps[0, 2])  # the same image and t
    others = [eps[0, 0], eps[0, 1], eps[1, 0], eps[1, 1], eps[1, 2]]
    others += [noise(seed=4)["eps"][0, 0], noise(stream="variance")["eps"][0, 0]]
    train = type(source)(source.name, "train", source.pixels, source.num_levels)
    others.append(noise(train)["eps"][0, 0])
    assert len({other.tobytes() for other in others}) == len(others)
