"""The loop over (image, t) pairs: the value of a pair does not depend on the others."""

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


def test_batches_that_are_done_are_left_out_and_the_others_have_the_same_bits(replicated, source):
    """30 pairs are 4 batches of 8; what is done of a batch does not change which pairs it has."""
    pairs, t, is_done = ImageTimePairs(terms_of, SEED, batch_size=8), every_t(5, 6), np.zeros(30, bool)
    whole, _ = pairs.all(replicated, source, NUMBERS, t, "test")
    is_done[[*range(8), 9, *range(16, 24)]] = True
    measured, terms = [], []
    for numbers, (term, _) in pairs.some(replicated, source, NUMBERS, t, "test", is_done):
        measured.append(numbers)
        terms.append(term)
    assert [of_batch.tolist() for of_batch in measured] == [list(range(8, 16)), list(range(24, 30))]
    np.testing.assert_array_equal(np.concatenate(terms), whole.ravel()[np.concatenate(measured)])
    assert list(pairs.some(replicated, source, NUMBERS, t, "test", np.ones(30, bool))) == []


def test_an_image_is_read_once_for_a_batch_and_no_other_with_it(replicated, source):
    """Neither the host nor a device holds all the images that are scored."""
    read, pairs = [], ImageTimePairs(terms_of, SEED, batch_size=8)
    images_of = type(source).images

    class Counted(type(source)):
        def images(self, indices=slice(None)):
            read.append(indices)
            return images_of(self, indices)

    counted = Counted(source.name, source.split, source.pixels, source.num_levels)
    pairs.all(replicated, counted, NUMBERS, every_t(5, 6), "test")
    # The pairs 0…7 are six of the first image and two of the second, and so on.
    assert [set(indices) for indices in read] == [{29, 4}, {4, 17}, {17, 0}, {11}]
    assert all(len(indices) == len(set(indices)) for indices in read)


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
