"""Transparent colours of PNG files, read from the tRNS chunk if Pillow reads it in other units or only in part.

PNG specification, tRNS: a grey or a colour is given in the file's own bits, 1 to 16 of them. In a palette each entry
has an alpha value.
"""

import io

import numpy as np
from jaxtyping import Bool
from PIL import Image

SIGNATURE_BYTES = 8


def bits(data: bytes) -> int:
    """The bits of a channel in a PNG file, 1 to 16."""
    return _chunk(data, b"IHDR")[8]


def with_transparency(picture: Image.Image, data: bytes) -> Image.Image:
    """A PNG file's picture, loaded, with the transparency that the file gives it.

    Args:
        picture: as Pillow opened it.
        data: the content of the file.
    """
    picture.load()
    transparent = _chunk(data, b"tRNS")
    if "transparency" not in picture.info or transparent is None:
        return picture
    top = 2 ** bits(data) - 1
    # The chunk has 16 bits for each of one or three values. Only the lowest bits count.
    values = [int.from_bytes(transparent[begin : begin + 2]) & top for begin in (0, 2, 4)]
    if picture.mode == "P":
        picture.info["transparency"] = transparent  # Pillow may see a single entry in it
    elif picture.mode == "1":
        picture.info["transparency"] = values[0] * 255
    elif picture.mode == "L":
        picture.info["transparency"] = values[0] * 255 // top
    elif picture.mode == "RGB" and top == 255:
        picture.info["transparency"] = tuple(values)
    elif picture.mode == "RGB":
        del picture.info["transparency"]
        is_opaque = _differs(picture, data, np.array(values))
        picture.putalpha(Image.fromarray(is_opaque).convert("L"))
    return picture


def _differs(picture: Image.Image, data: bytes, colour: np.ndarray) -> Bool[np.ndarray, "h w"]:
    """Which pixels do not have this colour, in a picture of 16 bits a channel. Pillow keeps only the upper 8 bits."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as lower:
        lower.tile = [tile._replace(args="RGB;16L") for tile in lower.tile]  # the second of two bytes
        values = np.asarray(picture).astype(np.uint16) << 8 | np.asarray(lower)
    return (values != colour).any(axis=-1)


def _chunk(data: bytes, wanted: bytes) -> bytes | None:
    """The content of the first chunk of this kind; None if there is none before the pixels."""
    begin = SIGNATURE_BYTES
    while begin + 8 <= len(data):
        length, kind = int.from_bytes(data[begin : begin + 4]), data[begin + 4 : begin + 8]
        if kind == wanted:
            return data[begin + 8 : begin + 8 + length]
        if kind == b"IDAT":
            return None
        begin += 12 + length  # the length, the kind and a checksum
    return None
