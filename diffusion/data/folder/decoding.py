"""From picture files of any size and mode to pixel values of one size: orientation, transparency, crop, resize."""

import contextlib
import dataclasses
import io
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageColor, PngImagePlugin, UnidentifiedImageError

from diffusion.data.folder import metadata, png

VERSION = 3  # of the decoding: shards that an interrupted call of another version wrote are written again
# A file's content decides which of these it is. Pillow's other formats are not tried: some start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF")
NAMES = "JPEG, PNG, WebP, GIF, BMP or TIFF"
RESIZE = {
    "box": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
}
CROP = ("center", "none")
MODES = {1: "L", 3: "RGB"}  # by the number of channels
# Limits on the unpacked metadata of a PNG file: the colour profile or one text, and all texts. None of it is used.
MAX_METADATA_BYTES, MAX_TEXTS_BYTES = 2**26, 2**28
# EXIF tag Orientation -> the operation that sets the picture upright; other values need none.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Unreadable(ValueError):
    """A file that is damaged or not a picture; the message says why."""


@dataclasses.dataclass(frozen=True)
class Target:
    """The size and form that every picture gets.

    Attributes:
        height, width: in pixels.
        channels: 3, or 1 for grey.
        resize: "box", "lanczos" or "bicubic", all of them antialiased.
        crop: "center" cuts the largest centred part with the target's aspect ratio, "none" stretches instead.
        background: (R, G, B) behind transparent pixels.
    """

    height: int
    width: int
    channels: int = 3
    resize: str = "box"
    crop: str = "center"
    background: tuple[int, int, int] = (255, 255, 255)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.height, self.width, self.channels


def parse_colour(text: str) -> tuple[int, int, int]:
    """A colour as Pillow reads it: "white", "#ffffff", "rgb(255, 255, 255)".

    Raises:
        ValueError: it is not a colour, or has an alpha value.
    """
    try:
        colour = ImageColor.getrgb(text)
    except ValueError as error:
        raise ValueError(f"--background={text} is not a colour; for example white or #808080") from error
    if len(colour) != 3:
        raise ValueError(f"--background={text} has an alpha value, but nothing is behind the background")
    return colour


def to_pixels(data: bytes, target: Target) -> UInt8[np.ndarray, "h w c"]:
    """The pixel values of a picture file, of its first frame if it has several.

    A picture that has the target's size and mode already keeps its pixel values. Damaged metadata does not matter.

    Args:
        data: the content of the file.

    Raises:
        Unreadable: the file is damaged, is not one of FORMATS, or has pixels that 8 bits cannot show.
    """
    try:
        with _without_warnings():
            upright = metadata.tolerated(_upright_8_bits, data)
            opaque = _without_transparency(upright, target)
            return np.asarray(_fitted(opaque, target)).reshape(target.shape)
    except MemoryError:
        raise  # says nothing about the file
    except Exception as error:  # Pillow's decoders raise nearly every type for damage
        raise Unreadable(_reason(error, data)) from error


@contextlib.contextmanager
def opened(file: io.BytesIO | Path, formats: Sequence[str] | None = FORMATS) -> Iterator[Image.Image]:
    """A picture file as Pillow opens it. A PNG file may have more than the 1 MiB of metadata that Pillow allows."""
    with _LIMITS, Image.open(file, formats=formats) as picture:
        yield picture


class _Limits:
    """Replaces Pillow's limits on a PNG file's metadata by ours while any thread is inside."""

    def __init__(self):
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
                PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = MAX_METADATA_BYTES, MAX_TEXTS_BYTES
            self._inside += 1

    def __exit__(self, *exception) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = self._before


_LIMITS = _Limits()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Drops Pillow's warnings about harmless oddities. Only the main thread does so, because filters are global."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def orientation(picture: Image.Image) -> int:
    """The EXIF tag Orientation, 1 for an upright picture. No other tag is read; a damaged block counts as none."""
    try:
        return picture.getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:  # Pillow raises different types for garbage
        return 1


def _upright(picture: Image.Image) -> Image.Image:
    picture.load()  # this already turns a TIFF file's picture
    turn = _TURNS.get(orientation(picture))
    return picture.copy() if turn is None else picture.transpose(turn)


def _upright_8_bits(data: bytes) -> Image.Image:
    """A picture file's first frame the right way up, in a mode of 8 bits a channel."""
    with opened(io.BytesIO(data)) as picture:
        if picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        return as_8_bits(picture, data)


def as_8_bits(picture: Image.Image, data: bytes) -> Image.Image:
    """The picture the right way up, in a mode of 8 bits a channel."""
    if picture.mode in ("I", "F"):
        raise Unreadable("its pixel values are signed, 32-bit or real numbers")
    if not picture.mode.startswith("I;16"):
        return _upright(png.with_transparency(picture, data) if picture.format == "PNG" else picture)
    top, is_negative = _levels(picture)
    picture = _upright(picture)
    # Pillow's own convert("L") would clip at 255 instead.
    values = np.asarray(picture).astype(np.uint32)
    grey = ((values * 255 + top // 2) // top).astype(np.uint8)
    grey = Image.fromarray(255 - grey if is_negative else grey)
    if "transparency" in picture.info:
        grey.putalpha(Image.fromarray(values != picture.info["transparency"]).convert("L"))
    return grey


def _levels(picture: Image.Image) -> tuple[int, bool]:
    """The highest pixel value of a picture of mode I;16, and whether it is black, as in some TIFF files."""
    tags = picture.tag_v2 if picture.format == "TIFF" else {}
    # Pillow reports 16 bits for 12 bits, too.
    bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]
    return 2**bits - 1, tags.get(ExifTags.Base.PhotometricInterpretation) == 0


def _without_transparency(picture: Image.Image, target: Target) -> Image.Image:
    """The picture over the background, in the target's mode."""
    if picture.has_transparency_data:
        if picture.mode == "La":
            picture = picture.convert("LA")  # Pillow cannot convert La to RGBA at once
        background = Image.new("RGBA", picture.size, target.background)
        picture = Image.alpha_composite(background, picture.convert("RGBA")).convert("RGB")
    return picture.convert(MODES[target.channels])


def _fitted(picture: Image.Image, target: Target) -> Image.Image:
    """The picture, cropped and resized to the target's size."""
    if target.crop == "center":
        picture = picture.crop(_center_box(*picture.size, target))
    if picture.size == (target.width, target.height):
        return picture
    return picture.resize((target.width, target.height), RESIZE[target.resize])


def _center_box(width: int, height: int, target: Target) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the largest centred part with the target's aspect ratio, to the nearest pixel."""
    if width * target.height > height * target.width:
        new_width, new_height = max(1, round(height * target.width / target.height)), height
    else:
        new_width, new_height = width, max(1, round(width * target.height / target.width))
    left, top = (width - new_width) // 2, (height - new_height) // 2
    return left, top, left + new_width, top + new_height


def _reason(error: Exception, data: bytes) -> str:
    """The problem with a file, in words without an object's address or a path."""
    if not data:
        return "the file is empty"
    if "MAX_TEXT" in str(error):
        return f"its colour profile or a text in it has more than {MAX_METADATA_BYTES / 2**20:g} MiB"
    if isinstance(error, UnidentifiedImageError):
        return f"Pillow cannot read it as {NAMES}"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    return " ".join(str(error).split()) or type(error).__name__
