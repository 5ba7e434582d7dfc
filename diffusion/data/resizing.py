"""From an encoded picture of a prepared set to pixel values in the size that the config asks for."""

import dataclasses
import functools
import io

import numpy as np
from jaxtyping import UInt8

from diffusion.data.folder import metadata
from diffusion.data.folder.decoding import MODES, Target, as_8_bits, opened, to_pixels


@dataclasses.dataclass(frozen=True)
class Resizing:
    """The size of the images. Without one, all pictures of a set must have the same size.

    Attributes:
        image_size: the side in pixels to which the centre square of every picture is resized; 0 leaves it as it is.
        pad_to: the side in pixels up to which black is added around every picture; 0 adds none.
    """

    image_size: int = 0
    pad_to: int = 0

    def shape(self, name: str, stored: tuple[int, int, int]) -> tuple[int, int, int]:
        """(H, W, C) of the result for pictures of the shape `stored`.

        Raises:
            ValueError: the pictures are larger than `pad_to`.
        """
        height, width, channels = (self.image_size, self.image_size, stored[2]) if self.image_size else stored
        if self.pad_to and self.pad_to < max(height, width):
            raise ValueError(
                f"data.pad_to={self.pad_to} is less than the {height}×{width} pixels of data.name={name!r}; "
                "data.image_size makes pictures smaller"
            )
        return self.pad_to or height, self.pad_to or width, channels

    def pixels(self, encoded: bytes, channels: int) -> UInt8[np.ndarray, "h w c"]:
        """The pixel values of an encoded picture, resized."""
        if self.image_size:
            pixels = to_pixels(encoded, Target(self.image_size, self.image_size, channels))
        else:
            pixels = metadata.tolerated(functools.partial(_as_stored, channels), encoded)
        if not self.pad_to:
            return pixels
        missing = [self.pad_to - length for length in pixels.shape[:2]]
        return np.pad(pixels, [*((less // 2, less - less // 2) for less in missing), (0, 0)])

    def __str__(self) -> str:
        """A text for file names: "" if nothing changes."""
        size, pad = (f"-{self.image_size}" if self.image_size else ""), (f"-pad{self.pad_to}" if self.pad_to else "")
        return size + pad


def _as_stored(channels: int, encoded: bytes) -> UInt8[np.ndarray, "h w c"]:
    """The pixel values of an encoded picture in its own size."""
    with opened(io.BytesIO(encoded), formats=None) as picture:
        if picture.mode.startswith(("I", "F")):  # 16 bits and more, which `convert` would clip at 255
            picture = as_8_bits(picture, encoded)
        return np.atleast_3d(np.asarray(picture.convert(MODES[channels])))
