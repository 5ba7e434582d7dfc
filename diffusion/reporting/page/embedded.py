"""Pictures inside the page, each with a bound on its size."""

import base64
import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from diffusion.reporting.page.markup import Markup, element

# A page of a run holds the samples, the trajectory twice, at most 4 plots and 8 pictures of samples during training. In
# base64, with text and curves, that is less than 12 MB; the page of a typical run has a few hundred kB.
MAX_BYTES, MAX_TRAJECTORY_BYTES, MAX_PLOT_BYTES, MAX_SMALL_BYTES = 2**21, 2**20, 2**19, 2**18
VISIBLE_WIDTH = 640  # pixels of the screen that small pictures are enlarged to, at most


def encoded(pixels: UInt8[np.ndarray, "h w c"]) -> bytes:
    """A PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, format="png")
    return file.getvalue()


def shrunk(
    data: bytes, pixels: UInt8[np.ndarray, "h w c"], max_bytes: int
) -> tuple[bytes, UInt8[np.ndarray, "smaller_h smaller_w c"]]:
    """The same PNG file, or one of half, a quarter, … of its width, by means of squares, until it has max_bytes."""
    while len(data) > max_bytes:
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).reduce(2)
        pixels = np.asarray(image).reshape(image.height, image.width, -1)
        data = encoded(pixels)
    return data, pixels


def data_uri(data: bytes) -> str:
    """A PNG file as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def image(
    pixels: UInt8[np.ndarray, "h w c"],
    alt: str,
    data: bytes | None = None,
    max_bytes: int = MAX_BYTES,
    enlarged: bool = False,
) -> Markup:
    """A picture.

    Args:
        pixels: of the picture.
        alt: what it shows, for those who do not see it.
        data: its PNG file, if there is one already.
        max_bytes: a larger file is shrunk.
        enlarged: by an integer factor, with visible pixels.
    """
    data, pixels = shrunk(data or encoded(pixels), pixels, max_bytes)
    height, width = pixels.shape[:2]
    factor = max(1, VISIBLE_WIDTH // width) if enlarged else 1
    return element(
        "img",
        src=data_uri(data),
        alt=alt,
        width=width * factor,
        height=height * factor,
        class_="pixels" if enlarged else None,
    )


def figure(picture: Markup, caption: str) -> Markup:
    """A picture with a line below it."""
    return element("figure", picture, element("figcaption", caption))
