"""Decoded pictures: their size, the splits they come from, and where they are kept."""

import mmap

import numpy as np
import pytest
from PIL import Image

from diffusion import data
from diffusion.data import Source, decoded


def load(directory, split="train", **fit):
    return data.load("foreign", split, str(directory), **fit)


# --- sizes


def test_a_set_that_promises_no_size_has_that_of_its_first_picture(tmp_path, write_foreign):
    pixels = write_foreign((None, None, 3), sizes=3 * [(4, 6)])
    assert data.describe("foreign", str(tmp_path)).image_shape == (4, 6, 3)
    np.testing.assert_array_equal(load(tmp_path).images(), pixels)


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


def test_what_was_read_of_a_mapped_file_is_given_back(tmp_path):
    given_back, whole = [], np.random.default_rng(0).integers(0, 256, (9, 4, 4, 1), np.uint8)

    class Mapped(mmap.mmap):
        def madvise(self, advice):
            given_back.append(advice)

    (tmp_path / "pixels").write_bytes(whole.tobytes())
    with (tmp_path / "pixels").open("rb") as file:
        mapped = Mapped(file.fileno(), 0, access=mmap.ACCESS_READ)
    source = Source("mapped", "test", np.ndarray(whole.shape, np.uint8, mapped))
    np.testing.assert_array_equal(source.images(np.array([3, 1])), whole[[3, 1]])
    assert given_back == [mmap.MADV_DONTNEED]
    source.images(slice(2, 4))
    assert len(given_back) == 1, "a slice is no copy, so its pages are still wanted"


def test_a_part_of_a_mapped_file_is_a_source_too(tmp_path):
    np.save(tmp_path / "pixels.npy", np.arange(9, dtype=np.uint8).reshape(9, 1, 1, 1))
    part = Source("part", "test", np.load(tmp_path / "pixels.npy", mmap_mode="r")[4:])
    assert part.images(np.array([0, 3])).ravel().tolist() == [4, 7]


def test_without_room_beside_the_set_the_pictures_go_elsewhere(digits_copy, monkeypatch):
    expected = np.array(data.load("digits", "test", str(digits_copy)).images())
    for path in digits_copy.rglob("decoded-*"):
        path.unlink()
    full = digits_copy / "digits" / "1.0.0"
    monkeypatch.setattr(decoded, "_has_room", lambda directory, num_bytes: directory != full)
    np.testing.assert_array_equal(data.load("digits", "test", str(digits_copy)).images(), expected)
    assert not list(digits_copy.rglob("decoded-*"))
    monkeypatch.setattr(decoded, "_has_room", lambda directory, num_bytes: False)
    with pytest.raises(OSError, match=r"the decoded test pictures of data\.name='digits' take 0\.0 GiB.*no room in"):
        data.load("digits", "test", str(digits_copy))


def test_a_disk_that_cannot_be_read_is_not_called_damage(digits_copy, monkeypatch):
    def fail(*args):
        raise OSError(5, "Input/output error")
        yield

    monkeypatch.setattr(decoded, "_examples", fail)
    with pytest.raises(OSError, match="Input/output error"):
        data.load("digits", "test", str(digits_copy))
