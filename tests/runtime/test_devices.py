"""Data on devices: a tree comes back unchanged, and every item of a batch is computed once."""

import jax
import numpy as np
import pytest

from diffusion.runtime import devices


def test_a_replicated_tree_comes_back_as_it_was():
    tree = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": (np.int32(7),)}
    replicated = devices.replicate(tree)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(replicated.leaves)} == {8}
    back = replicated.host()
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert isinstance(one, np.ndarray) and one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(replicated.part(lambda tree: tree["a"]).host(), tree["a"])


@pytest.mark.parametrize(("num_items", "batch_size"), [(20, 16), (3, 256), (16, 16), (17, 8), (1, 1)])
def test_batches_hold_every_item_once_and_have_one_shape(num_items, batch_size):
    shapes = []

    def fn(shared, items):
        number, image = items
        shapes.append(number.shape)  # when it is traced: once for each shape
        return {"sum": shared["offset"] + number, "image": 2 * image}

    items = np.arange(num_items), np.arange(3 * num_items, dtype=np.float32).reshape(num_items, 3)
    shared = {"offset": devices.replicate(np.int32(100))}
    numbers, results = zip(*devices.over_batches(fn)(shared, items, batch_size), strict=True)
    assert np.concatenate(numbers).tolist() == list(range(num_items))
    np.testing.assert_array_equal(np.concatenate([result["sum"] for result in results]), items[0] + 100)
    np.testing.assert_array_equal(np.concatenate([result["image"] for result in results]), 2 * items[1])
    assert len(shapes) == 1
    # The batches are as equal as they can be, and the devices' shares of them, too.
    assert len(results) == -(-num_items // batch_size) if batch_size >= 8 else len(results) == 1
    assert shapes[0] == (-(-num_items // len(results) // 8),)


def test_many_batches_share_one_program_whatever_the_number_of_items():
    shapes = []

    def fn(shared, items):
        shapes.append(items.shape)  # when it is traced: once for each shape
        return shared + items

    batches, shared = devices.over_batches(fn), devices.replicate(np.int32(100))
    for num_items in (800 * 19 + 1, 800 * 25 + 1, 800 * 20):
        numbers, results = zip(*batches(shared, np.arange(num_items), 800), strict=True)
        assert np.concatenate(numbers).tolist() == list(range(num_items))
        assert np.concatenate(results).tolist() == list(range(100, 100 + num_items))
    assert shapes == [(100,)]


def test_no_items_are_no_batches():
    batches = devices.over_batches(lambda shared, items: items)
    assert list(batches(devices.replicate(np.int32(0)), np.arange(0), 4)) == []
