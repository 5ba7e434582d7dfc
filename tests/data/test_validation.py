"""Validation images are chosen by their contents: the laws of the split."""

import dataclasses
import hashlib

import numpy as np
import pytest

from diffusion.data import Source, validation
from diffusion.data.validation import A_TENTH, set_aside, split_off
from diffusion.experiment import build

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (2000, 4, 4, 1), np.uint8)
SOURCE = Source("noise", "train", PIXELS, classes=np.arange(2000, dtype=np.int32) % 10, num_classes=10)


def with_pixels(pixels):
    return Source("noise", "train", pixels)


@pytest.mark.parametrize("wanted", [1, 150, 1999, A_TENTH])
def test_every_image_is_on_one_side_with_its_label(wanted):
    train, aside = split_off(SOURCE, wanted)
    assert (train.split, aside.split) == ("train", "validation")
    assert len(train) + len(aside) == len(SOURCE)
    if wanted > 0:
        assert len(aside) == wanted
    both = np.concatenate([train.images(), aside.images()])
    order = np.argsort(np.concatenate([train.chosen, aside.chosen]))
    np.testing.assert_array_equal(both[order], PIXELS)
    np.testing.assert_array_equal(aside.labels(), SOURCE.labels()[aside.chosen])
    some = np.array([[0, 2], [1, 0]])[:, : len(aside)] % len(aside)
    np.testing.assert_array_equal(aside.images(some), PIXELS[aside.chosen[some]])
    np.testing.assert_array_equal(np.concatenate(list(aside.parts())), aside.images())


def test_none_are_set_aside_by_default_and_the_digest_of_the_data_is_what_it_was():
    train, aside = split_off(SOURCE, 0)
    assert train is SOURCE and len(aside) == 0
    assert train.sha256() == SOURCE.sha256()


def test_a_tenth_is_about_a_tenth_and_adding_images_moves_none():
    before = set_aside(SOURCE, A_TENTH)
    assert abs(before.sum() - 200) < 4 * (2000 * 0.1 * 0.9) ** 0.5
    more = np.concatenate([RNG.integers(0, 256, (500, 4, 4, 1), np.uint8), PIXELS])
    np.testing.assert_array_equal(set_aside(with_pixels(more), A_TENTH)[500:], before)


def test_the_order_of_the_files_plays_no_part_and_equal_images_are_on_the_same_side():
    order = RNG.permutation(len(SOURCE))
    for wanted in (150, A_TENTH):
        before = set_aside(SOURCE, wanted)
        np.testing.assert_array_equal(set_aside(with_pixels(PIXELS[order]), wanted), before[order])
    twice = set_aside(with_pixels(np.concatenate([PIXELS, PIXELS[::-1]])), A_TENTH)
    np.testing.assert_array_equal(twice[:2000], twice[2000:][::-1])


def test_a_given_number_are_those_with_the_lowest_digests():
    by_hand = [int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8).digest(), "big") for image in PIXELS]
    np.testing.assert_array_equal(np.flatnonzero(set_aside(SOURCE, 20)), sorted(np.argsort(by_hand)[:20]))
    np.testing.assert_array_equal(set_aside(SOURCE, A_TENTH), np.array(by_hand, float) < 2**64 / 10)


def test_a_digest_says_what_was_left_to_train_on():
    few, many = (split_off(SOURCE, wanted)[0] for wanted in (10, 20))
    assert len({SOURCE.sha256(), few.sha256(), many.sha256(), split_off(SOURCE, 10)[1].sha256()}) == 4
    assert few.sha256() == split_off(dataclasses.replace(SOURCE), 10)[0].sha256()


def test_something_must_be_left_to_train_on(tiny):
    with pytest.raises(ValueError, match="data.validation=2000 leaves none of the 2000 training images to train on"):
        split_off(SOURCE, 2000)
    with pytest.raises(ValueError, match="data.validation=5000 leaves none of the 1498 training images"):
        build.load_splits(tiny(data__validation=5000))


def test_a_mapped_file_is_split_without_a_copy_of_it(tiny):
    splits = build.load_splits(tiny(data__validation=100))
    assert [len(split) for split in splits] == [1398, 100, 299]
    assert np.shares_memory(splits.train.pixels, splits.validation.pixels)
    assert build.load_data(tiny(data__validation=100), "validation").sha256() == splits.validation.sha256()
    assert len(build.load_data(tiny(data__validation=0), "train")) == 1498


def test_an_image_is_read_once_to_be_set_aside(monkeypatch):
    read = []
    monkeypatch.setattr(Source, "images", lambda self, numbers: read.extend(numbers) or PIXELS[numbers])
    validation.set_aside(SOURCE, A_TENTH)
    assert read == list(range(2000))
