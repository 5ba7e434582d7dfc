"""PNG files written by hand: transparent colours as in the specification (tRNS), large texts and profiles."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from diffusion.data import pixel_files
from diffusion.data.folder import decoding
from diffusion.data.folder.decoding import Target, Unreadable, to_pixels
from diffusion.data.resizing import Resizing

RNG = np.random.default_rng(0)
BACKGROUND = (10, 200, 77)
GREY, COLOUR, INDEXED = 0, 2, 3  # types of PNG
ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def packed(values, bits):
    """The scan lines, without a filter, of pixel values [H, W] or [H, W, 3] of so many bits."""
    lines = b""
    for row in values.reshape(len(values), -1).tolist():
        digits = "".join(f"{value:0{bits}b}" for value in row)
        length = -(-len(digits) // 8)
        lines += b"\0" + int(digits.ljust(8 * length, "0"), 2).to_bytes(length)
    return lines


def png(values, bits, kind, transparent, palette=b"", interlaced=False, chunks=b""):
    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, interlaced)
    passes = [values[y::dy, x::dx] for x, y, dx, dy in ADAM7] if interlaced else [values]
    lines = b"".join(packed(part, bits) for part in passes if part.size)
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunks
    colours = chunk(b"PLTE", palette) if palette else b""
    key = chunk(b"tRNS", transparent) if transparent else b""
    return head + colours + key + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def assert_shows(data, colours, alpha):
    """That the file's picture is the exact mixture of colours [H, W, 3] and the background, rounded."""
    found, alpha = to_pixels(data, Target(*alpha.shape, background=BACKGROUND)), alpha[..., None]
    expected = (2 * (colours.astype(int) * alpha + np.array(BACKGROUND) * (255 - alpha)) + 255) // 510
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_is_meant_in_the_bits_of_the_file(bits):
    top = 2**bits - 1
    values = np.arange(16 * 16).reshape(16, 16) * 257 % (top + 1)
    for key in {0, 1, int(values[3, 5]), top}:
        colours = np.repeat(((values * 255 + top // 2) // top)[..., None], 3, axis=-1)
        for above in (0, 2**bits) if bits < 16 else (0,):  # of the chunk's 16 bits the lowest count
            assert_shows(png(values, bits, GREY, struct.pack(">H", key + above)), colours, 255 * (values != key))


@pytest.mark.parametrize("interlaced", [False, True])
def test_a_transparent_colour_of_16_bits_is_compared_in_all_of_them(interlaced):
    values = RNG.integers(0, 2**16, (9, 11, 3))
    key = np.array([0x1234, 0x00FF, 0xFF00])
    values[2, 3] = values[8, 10] = key
    values[4, 4], values[5, 5], values[6, 6] = key + [1, 0, 0], key + [0, 0, 255], key >> 8  # not it
    alpha = np.full((9, 11), 255)
    alpha[2, 3] = alpha[8, 10] = 0
    assert_shows(png(values, 16, COLOUR, struct.pack(">HHH", *key), interlaced=interlaced), values >> 8, alpha)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("alphas", [[0], [255, 0], [255, 0, 10], [9, 200, 0, 255], []])  # 10 is a line feed
def test_every_entry_of_a_palette_has_the_alpha_value_that_the_file_gives_it(bits, alphas):
    size, alphas = 2**bits, alphas[: 2**bits]
    values, palette = np.arange(256).reshape(16, 16) % size, RNG.integers(0, 256, (size, 3), np.uint8)
    alpha = np.array(alphas + (size - len(alphas)) * [255])[values]
    assert_shows(png(values, bits, INDEXED, bytes(alphas), palette.tobytes()), palette[values], alpha)


def test_a_transparent_picture_may_be_turned():
    values = np.arange(24).reshape(4, 6) % 4
    exif = chunk(b"eXIf", struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, 0x0112, 3, 1, 6, 0, 0))
    turned = np.rot90(values, -1)
    colours = np.repeat((85 * turned)[..., None], 3, axis=-1)
    assert_shows(png(values, 2, GREY, struct.pack(">H", 1), chunks=exif), colours, 255 * (turned != 1))


PROFILE = b"icc\0\0" + zlib.compress(bytes(3 * 2**20))
TEXTS = {"iCCP": PROFILE, "zTXt": PROFILE, "iTXt": b"text\0\1\0\0\0" + PROFILE[5:]}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_png_may_hold_a_large_profile_or_text_up_to_a_limit_of_our_own(kind, tmp_path, monkeypatch):
    values = RNG.integers(0, 256, (4, 5, 3))
    data = png(values, 8, COLOUR, b"", chunks=chunk(kind.encode(), TEXTS[kind]))
    with pytest.raises(ValueError, match="MAX_TEXT"):  # Pillow's limit is 1 MiB of what is compressed
        Image.open(io.BytesIO(data)).load()
    (tmp_path / "1.png").write_bytes(data)
    prepared, of_folder = Resizing().pixels(data, channels=3), pixel_files.read(tmp_path, (4, 5, 3), 256)[0]
    for found in (to_pixels(data, Target(4, 5)), prepared, of_folder):
        np.testing.assert_array_equal(found, values)
    before = PngImagePlugin.MAX_TEXT_CHUNK
    monkeypatch.setattr(decoding, "MAX_METADATA_BYTES", 2**21)
    monkeypatch.setattr(decoding, "MAX_TEXTS_BYTES", 2**21)
    with pytest.raises(Unreadable, match="its colour profile or a text in it has more than 2 MiB"):
        to_pixels(data, Target(4, 5))
    assert PngImagePlugin.MAX_TEXT_CHUNK == before
