"""Pictures with metadata that Pillow cannot parse have the pixels and the orientation that they have without it."""

import io
import struct

import numpy as np
import pytest
from PIL import Image
from test_decoding import COLOURS, GREYS, MALFORMED, OPAQUE, RGB, TRANSPARENT, encoded, exif_with
from test_png import chunk

from diffusion.data.folder import metadata
from diffusion.data.folder.decoding import Target, Unreadable, to_pixels
from diffusion.data.resizing import Resizing

PICTURE = RGB.crop((0, 0, 8, 5))
TALL, WIDE = Target(8, 5), Target(5, 8)
TURNED = exif_with(*MALFORMED["below zero"])  # and an orientation of 6


def pillow_refuses(data):
    try:
        Image.open(io.BytesIO(data)).load()
    except (OSError, ValueError, TypeError, IndexError, SyntaxError, struct.error):
        return True
    return False


# --- PNG

CHUNKS = {
    b"gAMA": b"1", b"cHRM": b"1", b"pHYs": b"1", b"sRGB": b"", b"acTL": b"1", b"fcTL": b"1", b"iCCP": b"name\0\1x",
    b"zTXt": b"key\0\1x",
}  # fmt: skip


@pytest.mark.parametrize("kind", CHUNKS)
def test_a_png_with_a_damaged_optional_chunk(kind):
    whole = encoded(PICTURE, "PNG", exif=TURNED)
    data = whole[:33] + chunk(kind, CHUNKS[kind]) + whole[33:]
    assert pillow_refuses(data)
    np.testing.assert_array_equal(to_pixels(data, TALL), np.rot90(COLOURS[:5], -1))
    np.testing.assert_array_equal(Resizing().pixels(data, channels=3), COLOURS[:5])  # as TFDS stores it


def test_damage_of_the_pixels_stays_damage_and_is_named():
    whole = encoded(PICTURE, "PNG")
    damaged = whole[:33] + chunk(b"gAMA", b"1") + whole[33:-30]
    with pytest.raises(Unreadable, match="Truncated gAMA"):
        to_pixels(damaged, WIDE)
    text = bytearray(chunk(b"tEXt", b"key\0value"))
    text[-1] ^= 1
    with pytest.raises(Unreadable):
        to_pixels(whole[:33] + bytes(text) + whole[33:], WIDE)
    # A length that covers the palette: without the checksum, the picture would have other colours.
    palette = encoded(PICTURE.quantize(7), "PNG")
    end = palette.index(b"IDAT") - 4
    covering = struct.pack(">I", end - 33) + b"pHYs" + palette[33:end] + b"\0\0\0\0"
    with pytest.raises(Unreadable):
        to_pixels(palette[:33] + covering + palette[end:], WIDE)


# --- JPEG


def segment(marker, content):
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def without_jfif(data):
    return data[:2] + data[4 + int.from_bytes(data[4:6]) :]


def dpi(kind):
    """An EXIF block of an orientation of 6 and a resolution of one byte, from which Pillow wants two numbers."""
    entries = [(0x0112, 3, 1, 6), (0x011A, kind, 1, 1), (0x0128, 3, 1, 2)]
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 3) + directory + b"\0\0\0\0"


SEGMENTS = {
    "empty profile": segment(0xE2, b"ICC_PROFILE\0"),
    "short adobe": segment(0xEE, b"Adobe"),
    "short jfif": segment(0xE0, b"JFIF\0"),
    "short photoshop": segment(0xED, b"Photoshop 3.0\x008BIM\0\1"),
    "resolution of type byte": segment(0xE1, dpi(1)),
    "resolution of no type": segment(0xE1, dpi(7)),
}


@pytest.mark.parametrize("kind", SEGMENTS)
def test_a_jpeg_with_a_damaged_segment(kind):
    whole = without_jfif(encoded(PICTURE, "JPEG", exif=b"" if "resolution" in kind else TURNED, comment="a comment"))
    data = whole[:2] + SEGMENTS[kind] + whole[2:]
    assert pillow_refuses(data)
    np.testing.assert_array_equal(to_pixels(data, TALL), np.rot90(to_pixels(encoded(PICTURE, "JPEG"), WIDE), -1))


@pytest.mark.parametrize("adobe", [b"", segment(0xEE, b"Adobe" + bytes(7))])  # its last byte: the colours are RGB
@pytest.mark.parametrize("jfif", [False, True])
def test_the_colours_of_a_jpeg_are_those_that_it_names(jfif, adobe):
    whole = encoded(PICTURE, "JPEG")
    data = without_jfif(whole) if not jfif else whole
    data = data[:2] + (data[2:20] if jfif else b"") + adobe + data[20 if jfif else 2 :]
    expected = to_pixels(data, WIDE)
    damaged = data[:2] + SEGMENTS["empty profile"] + data[2:]
    np.testing.assert_array_equal(to_pixels(damaged, WIDE), expected)
    assert (expected == to_pixels(whole, WIDE)).all() == (jfif or not adobe)


# --- TIFF


def tiff(order, *entries, big=False):
    """A grey TIFF or BigTIFF file with an orientation of 6 and more entries (tag, type, count, bytes of the value)."""
    number, place, width = ("Q", "Q", 8) if big else ("H", "I", 4)
    tags = {256: 8, 257: 5, 258: 8, 259: 1, 262: 1, 273: 16, 274: 6, 277: 1, 278: 5, 279: 40}
    own = [(tag, 4, 1, struct.pack(f"{order}I", value)) for tag, value in tags.items()]
    directory = b"".join(struct.pack(f"{order}HH{place}{width}s", *entry) for entry in sorted([*own, *entries]))
    words = (43, 8, 0, 56) if big else (42, 56)
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HHHQ" if big else f"{order}HI", *words)
    count = struct.pack(f"{order}{number}", len(own) + len(entries))
    return head.ljust(16, b"\0") + GREYS[:5].tobytes() + count + directory + bytes(width)


@pytest.mark.parametrize(("order", "big"), [("<", False), (">", False), ("<", True)])
@pytest.mark.parametrize("entry", [(0x02BC, 3, 1), (0x8769, 9, 1), (0x8825, 9, 1)])
def test_a_tiff_with_damaged_xmp_exif_or_gps(entry, order, big):
    data = tiff(order, (*entry, b"\xff\xff\xff\xff"), big=big)
    assert pillow_refuses(data) and not pillow_refuses(tiff(order, big=big))
    np.testing.assert_array_equal(to_pixels(data, Target(8, 5, channels=1))[..., 0], np.rot90(GREYS[:5], -1))


def test_a_damaged_number_of_entries_costs_no_memory():
    whole = tiff("<", big=True)
    with pytest.raises(struct.error):
        metadata.without_metadata(whole[:56] + b"\xff" * 8 + whole[64:])


# --- good pictures


def test_without_metadata_the_pixels_stay_the_same():
    files = {kind: encoded(picture, name, **options) for kind, (picture, name, options) in OPAQUE.items()}
    files |= {kind: data for kind, (data, _, _) in TRANSPARENT.items()}
    for kind, data in files.items():
        for target in (Target(8, 8), Target(8, 8, channels=1, background=(1, 2, 3))):
            found = to_pixels(metadata.without_metadata(data), target)
            np.testing.assert_array_equal(found, to_pixels(data, target), err_msg=kind)


def test_a_good_picture_is_decoded_once():
    calls = []
    assert metadata.tolerated(lambda data: calls.append(data) or len(calls), b"data") == 1
