"""The sizes of images in other lossless formats."""

import io
import lzma

import numpy as np
import pytest
from PIL import Image

from diffusion.evaluation import image_formats

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_sheet_shows_every_image_once(channels):
    images = RNG.integers(1, 256, (7, 4, 5, channels)).astype(np.uint8)
    sheet = image_formats.contact_sheet(images)
    assert sheet.shape == (12, 15, channels)
    for n in range(7):
        row, column = divmod(n, 3)
        shown = sheet[4 * row : 4 * row + 4, 5 * column : 5 * column + 5]
        np.testing.assert_array_equal(shown, images[n])
    assert not sheet[8:, 5:].any()


def test_sizes_are_those_of_files():
    images = RNG.integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    sizes = image_formats.sizes_bytes(images)
    assert sizes["xz"] == len(lzma.compress(images.tobytes(), preset=9 | lzma.PRESET_EXTREME))
    file = io.BytesIO()
    Image.fromarray(image_formats.contact_sheet(images)).save(file, format="WEBP", lossless=True, quality=100, method=6)
    assert sizes["webp_sheet"] == len(file.getvalue())
    np.testing.assert_array_equal(np.asarray(Image.open(file)), image_formats.contact_sheet(images))
    assert sizes["png"] > images.size and sizes["webp"] > sizes["webp_sheet"]
    wide = np.zeros((1, 1, image_formats.MAX_SHEET + 1, 1), np.uint8)
    assert image_formats.FORMATS["webp_sheet"](wide) is None
