"""Grids of images, denoising trajectories and PNG files."""

import math
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from diffusion.runtime import files

MARGIN = 2  # grey pixels between the images of a grid


def image_grid(
    images: UInt8[np.ndarray, "n h w c"], num_levels: int = 256, columns: int | None = None
) -> UInt8[np.ndarray, "grid_h grid_w c"]:
    """Lays images out row by row, as square as possible unless `columns` is given.

    Pixel values 0…num_levels-1 are scaled to 0…255. Images below 48 pixels are enlarged by an integer factor, to at
    most 48 pixels.
    """
    n, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    rows = math.ceil(n / columns)
    factor = max(1, 48 // max(height, width))
    visible = np.round(images * (255 / (num_levels - 1))).astype(np.uint8)
    visible = visible.repeat(factor, axis=1).repeat(factor, axis=2)
    cell_height, cell_width = height * factor + MARGIN, width * factor + MARGIN
    grid = np.full((rows * cell_height + MARGIN, columns * cell_width + MARGIN, channels), 128, np.uint8)
    for i, image in enumerate(visible):
        top, left = MARGIN + i // columns * cell_height, MARGIN + i % columns * cell_width
        grid[top : top + height * factor, left : left + width * factor] = image
    return grid


def class_grid(
    images: UInt8[np.ndarray, "n h w c"], labels: Int[np.ndarray, " n"], num_levels: int = 256
) -> UInt8[np.ndarray, "grid_h grid_w c"]:
    """Lays images out with a row per class, in the order of the labels. Shorter rows are filled with grey."""
    of_class = [images[labels == label] for label in np.unique(labels)]
    columns = max(len(row) for row in of_class)
    grey = np.full((1, *images.shape[1:]), num_levels // 2, np.uint8)
    rows = [np.concatenate([row, grey.repeat(columns - len(row), axis=0)]) for row in of_class]
    return image_grid(np.concatenate(rows), num_levels, columns)


def trajectory_grid(
    trajectories: UInt8[np.ndarray, "n f h w c"], num_levels: int = 256
) -> UInt8[np.ndarray, "grid_h grid_w c"]:
    """Lays trajectories out with a row per sample: x̂_0 from the first step (left) to the finished image (right)."""
    return image_grid(trajectories.reshape(-1, *trajectories.shape[2:]), num_levels, columns=trajectories.shape[1])


def save_png(path: str | Path, picture: UInt8[np.ndarray, "h w c"]) -> None:
    """Writes a picture of one (grey) or three (RGB) channels, completely or not at all."""
    with files.replacing(Path(path)) as file:
        Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture).save(file, format="png")
