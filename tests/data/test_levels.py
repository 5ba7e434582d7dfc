"""Pixel values and numbers in [-1, 1]."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.data.levels import to_levels, to_unit


@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_pixel_values_survive_the_way_to_the_unit_interval_and_back(num_levels):
    levels = np.arange(num_levels, dtype=np.uint8)
    x = to_unit(jnp.asarray(levels), num_levels)
    np.testing.assert_allclose(x, np.linspace(-1, 1, num_levels), atol=2e-7)
    np.testing.assert_array_equal(to_levels(x, num_levels), levels)


def test_what_lies_between_is_rounded_and_what_lies_outside_is_clipped():
    x = jnp.asarray([-3.0, -1.0 + 0.49 / 8, -1.0 + 0.51 / 8, 1.0, 3.0])
    np.testing.assert_array_equal(to_levels(x, 17), [0, 0, 1, 16, 16])
