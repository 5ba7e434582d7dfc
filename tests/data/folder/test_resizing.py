"""Crop and resize: equal to Pillow's, the mean of an area, and no change if the size is right."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion.data.folder import decoding
from diffusion.data.folder.decoding import Target, to_pixels

RNG = np.random.default_rng(0)
PHOTO = np.clip(np.cumsum(RNG.normal(0, 9, (60, 90, 3)), axis=1) + 128, 0, 255).astype(np.uint8)


def png(pixels):
    """The bytes of a PNG file of these pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("method, resample", [("box", 4), ("lanczos", 1), ("bicubic", 3)])
@pytest.mark.parametrize("turned", [False, True])
def test_the_central_square_is_resized_as_pillow_does(method, resample, turned):
    wide = PHOTO.swapaxes(0, 1) if turned else PHOTO
    square = PHOTO[:, 15:75].swapaxes(0, 1) if turned else PHOTO[:, 15:75]
    pixels = to_pixels(png(wide), Target(16, 16, resize=method))
    expected = Image.fromarray(np.ascontiguousarray(square)).resize((16, 16), resample)
    np.testing.assert_array_equal(pixels, np.asarray(expected))


def test_box_is_the_mean_of_an_area_and_an_odd_pixel_is_cut_at_the_right():
    data = png(PHOTO[:40, :61])
    means = PHOTO[:40, 10:50].reshape(10, 4, 10, 4, 3).mean(axis=(1, 3))
    # Pillow rounds after the rows and after the columns.
    np.testing.assert_allclose(to_pixels(data, Target(10, 10)), means, atol=1)


def test_without_a_crop_the_picture_is_stretched():
    pixels = to_pixels(png(PHOTO), Target(20, 18, crop="none"))
    means = PHOTO.reshape(20, 3, 18, 5, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(pixels, means, atol=1)


@given(*[st.integers(1, 300)] * 4)
def test_the_crop_is_the_largest_centred_part_of_the_targets_shape(width, height, target_width, target_height):
    target = Target(target_height, target_width)
    left, top, right, bottom = decoding._center_box(width, height, target)
    new_width, new_height = right - left, bottom - top
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert new_width == width or new_height == height
    assert width - right - left in (0, 1) and height - bottom - top in (0, 1)
    # The side that was cut is at most half a pixel from the exact one, and at least one pixel long.
    if new_height == height and new_width < width:
        assert abs(new_width - height * target_width / target_height) <= 0.5 or new_width == 1
    if new_width == width and new_height < height:
        assert abs(new_height - width * target_height / target_width) <= 0.5 or new_height == 1


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]), st.sampled_from(list(decoding.RESIZE)))
@settings(max_examples=40, deadline=None)
def test_a_picture_of_the_targets_size_is_left_as_it_is(height, width, channels, method):
    shape = (height, width, channels) if channels == 3 else (height, width)
    pixels = np.random.default_rng(height).integers(0, 256, shape, np.uint8)
    data = png(pixels)
    for crop in decoding.CROP:
        target = Target(height, width, channels, method, crop)
        np.testing.assert_array_equal(to_pixels(data, target), pixels.reshape(target.shape))
