"""Pictures show the given pixels."""

import numpy as np
from PIL import Image

from diffusion.reporting import pictures


def test_a_grid_holds_every_pixel_in_reading_order():
    images = np.arange(5 * 2 * 3, dtype=np.uint8).reshape(5, 2, 3, 1) % 17
    grid = pictures.image_grid(images, num_levels=17, columns=3)
    factor, margin = 48 // 3, 2
    assert grid.shape == (2 * (2 * factor + margin) + margin, 3 * (3 * factor + margin) + margin, 1)
    for i, image in enumerate(images):
        top = margin + (i // 3) * (2 * factor + margin)
        left = margin + (i % 3) * (3 * factor + margin)
        cell = grid[top : top + 2 * factor, left : left + 3 * factor]
        for dy, dx in [(0, 0), (factor - 1, factor - 1)]:
            assert np.array_equal(cell[dy::factor, dx::factor], np.round(image * 15.9375))


def test_photographs_are_shown_as_they_are(tmp_path):
    photograph = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    pictures.save_png(tmp_path / "one.png", pictures.image_grid(photograph))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "one.png"))[2:-2, 2:-2], photograph[0])


def test_grey_pictures_stay_grey(tmp_path):
    grid = pictures.image_grid(np.full((4, 8, 8, 1), 16, np.uint8), num_levels=17)
    pictures.save_png(tmp_path / "grey.png", grid)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grey.png")), grid[:, :, 0])


def test_a_grid_is_as_square_as_it_can_be():
    grid = pictures.image_grid(np.zeros((5, 64, 64, 1), np.uint8))
    assert grid.shape == (2 * 66 + 2, 3 * 66 + 2, 1)


def test_a_trajectory_is_a_row_per_sample_from_left_to_right():
    trajectories = np.broadcast_to(np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1, 1), (2, 3, 64, 64, 1))
    picture = pictures.trajectory_grid(trajectories, num_levels=256)
    assert picture[33::66, 33::66, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
