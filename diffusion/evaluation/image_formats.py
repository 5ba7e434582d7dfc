"""The size of a set of images in the usual lossless formats, in bytes, to compare with the model's code."""

import contextlib
import io
import lzma
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image, features

Images = UInt8[np.ndarray, "n h w c"]
MAX_SHEET = 16_383  # pixels to a side, of WebP


def sizes_bytes(images: Images) -> dict[str, int | None]:
    """The bytes of each entry of FORMATS; None if a sheet would be too large or Pillow cannot write the format."""
    return {name: size(images) for name, size in FORMATS.items()}


def _each(**options) -> Callable[[Images], int | None]:
    """One file for each image."""

    def size(images: Images) -> int | None:
        return sum(_file_bytes(image, options) for image in images) if _can_write(options) else None

    return size


def _sheet(**options) -> Callable[[Images], int | None]:
    """One picture that shows all images side by side, so there is only one file header."""

    def size(images: Images) -> int | None:
        sheet = contact_sheet(images)
        return _file_bytes(sheet, options) if _can_write(options) and max(sheet.shape) <= MAX_SHEET else None

    return size


def contact_sheet(images: Images) -> UInt8[np.ndarray, "sheet_h sheet_w c"]:
    """All images in rows, as square as possible. The last row is filled up with 0."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    filled = np.zeros((rows * columns, *images.shape[1:]), np.uint8)
    filled[: len(images)] = images
    height, width, channels = images.shape[1:]
    grid = filled.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return grid.reshape(rows * height, columns * width, channels)


def _file_bytes(image: UInt8[np.ndarray, "h w c"], options: dict) -> int:
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, **options)
    return file.tell()


def _can_write(options: dict) -> bool:
    return options["format"] == "PNG" or options["format"].lower() in features.get_supported()


def _xz(images: Images) -> int:
    return len(lzma.compress(images.tobytes(), preset=9 | lzma.PRESET_EXTREME))


def _jpeg_xl(images: Images) -> int | None:
    """The size of the contact sheet, if `imagecodecs` is installed, which the project does not need."""
    with contextlib.suppress(ImportError):
        import imagecodecs

        return len(imagecodecs.jpegxl_encode(contact_sheet(images).squeeze(), lossless=True, effort=9))
    return None


_PNG = {"format": "PNG", "optimize": True}
_WEBP = {"format": "WEBP", "lossless": True, "quality": 100, "method": 6}

FORMATS: dict[str, Callable[[Images], int | None]] = {
    "png": _each(**_PNG),
    "png_sheet": _sheet(**_PNG),
    "webp": _each(**_WEBP),
    "webp_sheet": _sheet(**_WEBP),
    "jpeg_xl_sheet": _jpeg_xl,
    "xz": _xz,
}
