"""Picture files as pixel values: equal to Pillow's decoding and resizing, or else to formulas."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion.data.folder import decoding
from diffusion.data.folder.decoding import Target, Unreadable, to_pixels

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (8, 8, 3), np.uint8)
GREYS = COLOURS[..., 0]


def encoded(picture, picture_format, **options):
    """The bytes of a file of this picture."""
    file = io.BytesIO()
    picture.save(file, picture_format, **options)
    return file.getvalue()


def grey(data, height, width, **options):
    """[H, W] of a file's grey pixel values."""
    return to_pixels(data, Target(height, width, channels=1, **options))[..., 0]


def tiff(values, bits, photometric, last_tag=b""):
    """A grey TIFF file of one strip, as Pillow does not write them. `values`: [H, W]."""
    height, width = values.shape
    digits = "".join(f"{value:0{bits}b}" for value in values.flatten())
    if bits == 16:
        strip = values.astype("<u2").tobytes()
    else:
        strip = int(digits, 2).to_bytes(len(digits) // 8, "big")
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(strip)}
    directory = struct.pack("<H", len(tags) + bool(last_tag))
    for tag, value in tags.items():
        directory += struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + directory + last_tag + b"\0\0\0\0"


# --- Formats and modes

RGB = Image.fromarray(COLOURS)
OPAQUE = {
    "jpeg": (RGB, "JPEG", {}),
    "jpeg progressive": (RGB, "JPEG", {"progressive": True}),
    "jpeg grey": (RGB.convert("L"), "JPEG", {}),
    "jpeg cmyk": (RGB.convert("CMYK"), "JPEG", {}),
    "jpeg of two pictures": (RGB, "MPO", {"save_all": True, "append_images": [RGB.rotate(90)]}),
    "png": (RGB, "PNG", {}),
    "png grey": (RGB.convert("L"), "PNG", {}),
    "png 1-bit": (RGB.convert("1"), "PNG", {}),
    "png palette": (RGB.quantize(7), "PNG", {}),
    "apng": (RGB, "PNG", {"save_all": True, "append_images": [RGB.rotate(90)]}),
    "webp": (RGB, "WEBP", {}),
    "webp animated": (RGB, "WEBP", {"save_all": True, "append_images": [RGB.rotate(90)], "lossless": True}),
    "gif": (RGB, "GIF", {}),
    "gif animated": (RGB, "GIF", {"save_all": True, "append_images": [RGB.rotate(90)]}),
    "bmp": (RGB, "BMP", {}),
    "bmp 1-bit": (RGB.convert("1"), "BMP", {}),
    "tiff": (RGB, "TIFF", {}),
    "tiff lzw": (RGB, "TIFF", {"compression": "tiff_lzw"}),
    "tiff cmyk": (RGB.convert("CMYK"), "TIFF", {}),
    "tiff ycbcr": (RGB.convert("YCbCr"), "TIFF", {}),
    "tiff palette": (RGB.quantize(7), "TIFF", {}),
}


@pytest.mark.parametrize("channels, mode", [(3, "RGB"), (1, "L")])
@pytest.mark.parametrize("kind", OPAQUE)
def test_a_picture_of_the_targets_size_has_pillows_own_pixels(kind, channels, mode):
    picture, picture_format, options = OPAQUE[kind]
    data = encoded(picture, picture_format, **options)
    pixels = to_pixels(data, Target(8, 8, channels))
    expected = np.asarray(Image.open(io.BytesIO(data)).convert(mode)).reshape(8, 8, channels)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (8, 8, channels))
    np.testing.assert_array_equal(pixels, expected)
    if kind in ("png", "bmp", "tiff", "webp animated"):  # the first frame, without a loss
        np.testing.assert_array_equal(to_pixels(data, Target(8, 8)), COLOURS)


EVERY_VALUE = np.arange(2**16, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(EVERY_VALUE), "PNG"),
        encoded(Image.fromarray(EVERY_VALUE), "TIFF"),
        encoded(Image.fromarray(EVERY_VALUE.astype(">u2")), "TIFF"),
        tiff(EVERY_VALUE, bits=16, photometric=1),
    ],
    ids=["png", "tiff", "tiff big-endian", "tiff by hand"],
)
def test_16_bits_become_8_by_rounding(data):
    # 65,535 = 255 · 257, so v · 255 / 65,535 is v / 257.
    expected = np.array([[(value + 128) // 257 for value in row] for row in EVERY_VALUE.tolist()])
    np.testing.assert_array_equal(grey(data, 256, 256), expected)
    colours = to_pixels(data, Target(256, 256))
    np.testing.assert_array_equal(colours, np.repeat(expected[..., None], 3, axis=-1))


def test_a_tiff_of_12_bits_and_one_whose_highest_value_is_black():
    values = np.arange(2**12).reshape(64, 64)
    np.testing.assert_array_equal(grey(tiff(values, bits=12, photometric=1), 64, 64), np.round(values * 255 / 4095))
    negative = grey(tiff(EVERY_VALUE, bits=16, photometric=0), 256, 256)
    np.testing.assert_array_equal(negative, 255 - (EVERY_VALUE.astype(int) + 128) // 257)


# --- Orientation

TURNED = {  # what has to be done to the stored pixels, by the EXIF orientation
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("picture_format, options", [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_exif_says_which_way_is_up(orientation, picture_format, options):
    stored = COLOURS[:5]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(stored), picture_format, exif=exif.tobytes(), **options)
    expected = TURNED[orientation](stored)
    np.testing.assert_array_equal(to_pixels(data, Target(*expected.shape)), expected)


@pytest.mark.parametrize("picture_format", ["PNG", "TIFF"])
def test_a_picture_of_16_bits_is_turned_as_well(picture_format):
    values = EVERY_VALUE[:8, ::37]
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(values), picture_format, exif=exif.tobytes())
    np.testing.assert_array_equal(grey(data, 7, 8), np.rot90((values.astype(int) + 128) // 257, -1))


def exif_with(tag, kind, count, value):
    """An EXIF block of an orientation of 6 and another entry."""
    entries = sorted([(0x0112, 3, 1, struct.pack("<I", 6)), (tag, kind, count, value)])
    directory = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + directory + b"\0\0\0\0"


MALFORMED = {
    "text for a fraction": (0x011A, 2, 4, b"abc\0"),
    "text for a number": (0x0103, 2, 4, b"abc\0"),
    "not a number": (0x011A, 11, 1, struct.pack("<f", float("nan"))),
    "bytes for a number": (0x0103, 7, 4, b"\xff\xff\xff\xff"),
    "below zero": (0x011A, 9, 1, struct.pack("<i", -1)),
    "a part that is itself": (0x8769, 4, 1, struct.pack("<I", 8)),
    "beyond the end": (0x011A, 5, 1, struct.pack("<I", 10**6)),
    "of no type": (0x0103, 99, 1, b"\0\0\0\0"),
}


@pytest.mark.parametrize("picture_format, options", [("JPEG", {}), ("PNG", {}), ("WEBP", {"lossless": True})])
def test_of_exif_only_the_orientation_is_read(picture_format, options):
    stored = Image.fromarray(COLOURS[:5])
    upright = np.rot90(to_pixels(encoded(stored, picture_format, **options), Target(5, 8)), -1)
    for entry in MALFORMED.values():
        data = encoded(stored, picture_format, exif=exif_with(*entry), **options)
        np.testing.assert_array_equal(to_pixels(data, Target(8, 5)), upright)
    for garbage in (b"Exif\0\0garbage!garbage", b"Exif\0\0", exif_with(*MALFORMED["below zero"])[:16]):
        data = encoded(stored, picture_format, exif=garbage, **options)
        np.testing.assert_array_equal(to_pixels(data, Target(5, 8)), np.rot90(upright))


# --- Transparency

BACKGROUND = (10, 200, 77)
ALPHA = RNG.integers(0, 256, (8, 8), np.uint8)


def over_background(colours, alpha):
    """Exact mixture of colours [H, W, 3] and the background, rounded."""
    alpha = alpha[..., None].astype(int)
    return (2 * (colours * alpha + np.array(BACKGROUND) * (255 - alpha)) + 255) // 510


def with_key(values, key):
    """A PNG in which the pixels of the value `key` are transparent."""
    return encoded(Image.fromarray(values), "PNG", transparency=key)


GREY_RGB = np.repeat(GREYS[..., None], 3, axis=-1)
PALETTE = RGB.quantize(4)
RGBA = Image.fromarray(np.dstack([COLOURS, ALPHA]))
DEEP = EVERY_VALUE[::32, ::32]
DEEP_RGB = np.repeat((DEEP[..., None].astype(int) + 128) // 257, 3, axis=-1)
TRANSPARENT = {
    "rgba png": (encoded(RGBA, "PNG"), COLOURS, ALPHA),
    "rgba webp": (encoded(RGBA, "WEBP", lossless=True, exact=True), COLOURS, ALPHA),
    "rgba tiff": (encoded(RGBA, "TIFF"), COLOURS, ALPHA),
    "grey and alpha": (encoded(Image.fromarray(np.dstack([GREYS, ALPHA])), "PNG"), GREY_RGB, ALPHA),
    "a colour of rgb": (
        with_key(COLOURS, tuple(COLOURS[2, 3].tolist())),
        COLOURS,
        255 * (COLOURS != COLOURS[2, 3]).any(-1),
    ),
    "a grey": (with_key(GREYS, int(GREYS[2, 3])), GREY_RGB, 255 * (GREYS != GREYS[2, 3])),
    "a grey of 16 bits": (with_key(DEEP, int(DEEP[2, 3])), DEEP_RGB, 255 * (DEEP != DEEP[2, 3])),
    "1-bit": (
        encoded(RGB.convert("1"), "PNG", transparency=255),
        np.asarray(RGB.convert("1").convert("RGB")),
        np.asarray(~np.asarray(RGB.convert("1"))) * 255,
    ),
    "palette": (
        encoded(PALETTE, "PNG", transparency=bytes([0, 100, 255, 30])),
        np.asarray(PALETTE.convert("RGB")),
        np.array([0, 100, 255, 30])[np.asarray(PALETTE)],
    ),
    "gif": (
        encoded(PALETTE, "GIF", transparency=1, optimize=False),
        np.asarray(PALETTE.convert("RGB")),
        255 * (np.asarray(PALETTE) != 1),
    ),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparent_pixels_show_the_background(kind):
    data, colours, alpha = TRANSPARENT[kind]
    assert (alpha < 255).any() and (alpha > 0).any()
    pixels = to_pixels(data, Target(8, 8, background=BACKGROUND))
    np.testing.assert_array_equal(pixels, over_background(colours, alpha))
    opaque = Image.fromarray(over_background(colours, alpha).astype(np.uint8))
    np.testing.assert_array_equal(grey(data, 8, 8, background=BACKGROUND), np.asarray(opaque.convert("L")))


def test_colours_are_read_as_pillow_reads_them():
    assert decoding.parse_colour("white") == (255, 255, 255)
    assert decoding.parse_colour("#0a0b0c") == (10, 11, 12)
    with pytest.raises(ValueError, match="--background=whit is not a colour"):
        decoding.parse_colour("whit")
    with pytest.raises(ValueError, match="--background=#ffffff80 has an alpha value"):
        decoding.parse_colour("#ffffff80")


# --- Damage

WHOLE = {name: encoded(RGB, name) for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")}


@pytest.mark.parametrize("picture_format", WHOLE)
def test_a_cut_file_is_unreadable_unless_nothing_of_the_picture_is_missing(picture_format):
    data = WHOLE[picture_format]
    whole, refused = to_pixels(data, Target(8, 8)), 0
    for length in range(0, len(data), 7):
        try:
            np.testing.assert_array_equal(to_pixels(data[:length], Target(8, 8)), whole)
        except Unreadable as error:
            refused += 1
            assert str(error) and "\n" not in str(error) and "0x" not in str(error)
    assert refused > 0.7 * len(data) / 7


@given(st.sampled_from(list(WHOLE)), st.integers(0, 10**6), st.binary(min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_changed_bytes_give_pixels_or_a_reason(picture_format, position, garbage):
    data = bytearray(WHOLE[picture_format])
    position %= len(data)
    data[position : position + len(garbage)] = garbage
    try:
        assert to_pixels(bytes(data), Target(4, 4)).shape == (4, 4, 3)
    except Unreadable as error:
        assert str(error)


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "the file is empty"),
        (b"hello", "Pillow cannot read it as JPEG, PNG, WebP, GIF, BMP or TIFF"),
        (encoded(RGB, "PPM"), "Pillow cannot read it"),  # a picture, but of another format
        (encoded(Image.new("F", (8, 8)), "TIFF"), "signed, 32-bit or real"),
        (encoded(Image.new("I", (8, 8)), "TIFF"), "signed, 32-bit or real"),
    ],
)
def test_reasons(data, reason):
    with pytest.raises(Unreadable, match=reason):
        to_pixels(data, Target(8, 8))


@pytest.mark.parametrize("limit", [63, 20])  # Pillow warns above the limit, and raises above twice the limit
def test_a_decompression_bomb_is_unreadable(monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(Unreadable, match=f"more than {limit} pixels"):
        to_pixels(WHOLE["PNG"], Target(8, 8))


def test_what_is_not_the_files_fault_is_no_damage(monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MemoryError):
        to_pixels(WHOLE["PNG"], Target(8, 8))


def test_pillows_remarks_are_not_printed(recwarn):
    text_beyond_the_end = struct.pack("<HHII", 305, 2, 1000, 10**6)
    data = tiff(EVERY_VALUE, bits=16, photometric=1, last_tag=text_beyond_the_end)
    expected = grey(tiff(EVERY_VALUE, bits=16, photometric=1), 256, 256)
    assert not recwarn.list
    np.testing.assert_array_equal(grey(data, 256, 256), expected)
    assert not recwarn.list
    Image.open(io.BytesIO(data)).load()
    assert recwarn.list
