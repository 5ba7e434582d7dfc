"""Decoded pictures: their size, their splits, and the place of their files."""

import contextlib
import mmap
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion import data
from diffusion.data import Source, places, stored_split


def load(directory, split="train", **fit):
    return data.load("foreign", split, str(directory), **fit)


# --- sizes


def test_a_set_that_promises_no_size_has_that_of_its_first_picture(tmp_path, write_foreign):
    pixels = write_foreign((None, None, 3), sizes=3 * [(4, 6)])
    assert data.describe("foreign", str(tmp_path)).image_shape == (4, 6, 3)
    np.testing.assert_array_equal(load(tmp_path).images(), pixels)


@pytest.mark.parametrize("image_size", [0, 5])
def test_grey_pictures_of_16_bits_are_scaled_to_8(image_size, tmp_path, write_foreign):
    """Pillow alone would clip them, so that almost all become white."""
    pixels = write_foreign((5, 5, 1), bits=16)
    np.testing.assert_array_equal(load(tmp_path, image_size=image_size).images(), pixels)


def test_pictures_of_several_sizes_need_one_given(tmp_path, write_foreign):
    pixels = write_foreign((None, None, 3), sizes=[(8, 8), (12, 9), (20, 33)])
    with pytest.raises(ValueError, match=r"pictures of 8×8 and of 12×9 pixels.*: set data\.image_size"):
        load(tmp_path)
    assert data.describe("foreign", str(tmp_path), image_size=4).image_shape == (4, 4, 3)
    squares = [picture[top:][:side, left:][:, :side] for picture, top, left, side in zip(
        pixels, (0, 1, 0), (0, 0, 6), (8, 9, 20), strict=True)]  # fmt: skip
    expected = [np.asarray(Image.fromarray(square).resize((4, 4), Image.Resampling.BOX)) for square in squares]
    np.testing.assert_array_equal(load(tmp_path, image_size=4).images(), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_padding_puts_black_around_and_the_sizes_are_kept_apart(tmp_path, write_foreign, channels):
    pixels = np.stack(write_foreign((5, 4, channels)))
    padded = load(tmp_path, pad_to=8).images()
    np.testing.assert_array_equal(padded[:, 1:6, 2:6], pixels)
    assert padded.sum() == pixels.sum() and padded.shape == (4, 8, 8, channels)
    assert data.describe("foreign", str(tmp_path), pad_to=8).image_shape == (8, 8, channels)
    np.testing.assert_array_equal(load(tmp_path).images(), pixels)
    assert (load(tmp_path, image_size=8).images() != padded).any()
    np.testing.assert_array_equal(load(tmp_path, pad_to=8).images(), padded)


@pytest.mark.parametrize("use", [data.describe, lambda *args, **fit: data.load(args[0], "train", args[1], **fit)])
def test_padding_makes_nothing_smaller(tmp_path, write_foreign, use):
    write_foreign((5, 4, 1))
    with pytest.raises(ValueError, match=r"data\.pad_to=4 is less than the 5×4 pixels.*data\.image_size"):
        use("foreign", str(tmp_path), pad_to=4)


# --- splits


def test_a_validation_split_stands_for_a_test_split(tmp_path, write_foreign):
    pixels = write_foreign((4, 4, 1), splits=("train", "validation"))
    for split in ("train", "test"):
        np.testing.assert_array_equal(load(tmp_path, split).images(), pixels)
    assert data.describe("foreign", str(tmp_path)).num_test == 4


def test_of_a_set_without_either_every_twentieth_example_is_held_out(tmp_path, write_foreign):
    pixels = np.stack(write_foreign((2, 3, 1), sizes=45 * [(2, 3)], splits=("train",)))
    test = np.isin(np.arange(45), [19, 39])
    np.testing.assert_array_equal(load(tmp_path, "test").images(), pixels[test])
    np.testing.assert_array_equal(load(tmp_path, "train").images(), pixels[~test])
    described = data.describe("foreign", str(tmp_path))
    assert (described.num_train, described.num_test) == (43, 2)


# --- the file that is mapped


def test_pixels_are_mapped(digits_copy):
    assert isinstance(data.load("digits", "test", str(digits_copy)).pixels.base, mmap.mmap)


def test_what_is_read_of_a_mapped_file_is_announced_and_given_back(tmp_path):
    advice, whole = [], np.random.default_rng(0).integers(0, 256, (9, 30, 40, 1), np.uint8)

    class Mapped(mmap.mmap):
        def madvise(self, kind, start=0, length=None):
            advice.append((kind, start, length))

    (tmp_path / "pixels").write_bytes(bytes(100) + whole.tobytes())
    with (tmp_path / "pixels").open("rb") as file:
        mapped = Mapped(file.fileno(), 0, access=mmap.ACCESS_READ)
    source = Source("mapped", "test", np.ndarray(whole.shape, np.uint8, mapped, offset=100))
    np.testing.assert_array_equal(source.images(np.array([[-1], [1]])), whole[[-1, 1]][:, None])
    (before, *announced, after, last), page = advice, mmap.PAGESIZE
    assert [before, after, last] == [
        (kind, 0, None) for kind in (mmap.MADV_RANDOM, mmap.MADV_NORMAL, mmap.MADV_DONTNEED)
    ]
    for (kind, start, length), number in zip(announced, (8, 1), strict=True):
        assert (kind, start % page) == (mmap.MADV_WILLNEED, 0)
        assert start <= 100 + 1200 * number < start + page and start + length == 100 + 1200 * (number + 1)
    advice.clear()
    source.images(slice(2, 4))
    assert not advice, "a slice is no copy, so its pages are still wanted"


def read_from_disk():
    """Bytes that the system fetched for this process."""
    with contextlib.suppress(OSError):  # where there is no such file, or it may not be read
        return int(re.search(r"^read_bytes: (\d+)$", Path("/proc/self/io").read_text(), re.MULTILINE).group(1))
    return 0


def test_of_a_mapped_file_only_the_pages_of_the_examples_are_read(tmp_path):
    np.save(tmp_path / "pixels.npy", np.zeros((1000, 64, 64, 3), np.uint8))
    with (tmp_path / "pixels.npy").open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    source, before = Source("mapped", "test", np.load(tmp_path / "pixels.npy", mmap_mode="r")), read_from_disk()
    source.images(np.arange(50, 1000, 100))
    read = read_from_disk() - before
    if not read:
        pytest.skip("the files of tests lie in memory, or it is not said what is read")
    assert read < 10 * 64 * 1024, "an example has 12 KiB; Linux would read 128 KiB around each, and often more"


def test_a_part_of_a_mapped_file_is_a_source_too(tmp_path):
    np.save(tmp_path / "pixels.npy", np.arange(9, dtype=np.uint8).reshape(9, 1, 1, 1))
    part = Source("part", "test", np.load(tmp_path / "pixels.npy", mmap_mode="r")[4:])
    assert part.images(np.array([0, 3])).ravel().tolist() == [4, 7]


def test_without_room_beside_the_set_the_pictures_go_elsewhere(digits_copy, own_cache, monkeypatch, caplog):
    expected = np.array(data.load("digits", "test", str(digits_copy)).images())
    for path in digits_copy.rglob("decoded-*"):
        path.unlink()
    full, cache = digits_copy / "digits" / "1.0.0", own_cache / "digits-1.0.0"
    monkeypatch.setattr(places, "has_room", lambda directory, num_bytes: directory not in (full, cache))
    np.testing.assert_array_equal(data.load("digits", "test", str(digits_copy)).images(), expected)
    assert not [*digits_copy.rglob("decoded-*"), *cache.rglob("decoded-*")]
    assert f"for this process alone: {full}, {cache} cannot be written or has too little room" in caplog.text
    monkeypatch.setattr(places, "has_room", lambda directory, num_bytes: directory != full)
    for _ in range(2):  # decoded and kept, and taken from there
        source = data.load("digits", "test", str(digits_copy))
        np.testing.assert_array_equal(source.images(), expected)
        assert source.file.parent == cache and not list(digits_copy.rglob("decoded-*"))
        monkeypatch.setattr(stored_split, "_examples", None)
    monkeypatch.undo()
    for path in cache.rglob("*"):
        path.unlink()
    monkeypatch.setattr(places, "has_room", lambda directory, num_bytes: False)
    with pytest.raises(OSError, match=r"of data\.name='digits' take 0\.0 GiB.*no room in .*on_the_fly needs none"):
        data.load("digits", "test", str(digits_copy))


def test_a_disk_that_cannot_be_read_is_not_called_damage(digits_copy, monkeypatch):
    def fail(*args):
        raise OSError(5, "Input/output error")
        yield

    monkeypatch.setattr(stored_split, "_examples", fail)
    with pytest.raises(OSError, match="Input/output error"):
        data.load("digits", "test", str(digits_copy))
