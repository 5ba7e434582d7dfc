"""Pixel values as they are stored, 0…L − 1, and as the model sees them, in [-1, 1]."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8


def to_unit(images: UInt8[Array | np.ndarray, "*shape"], num_levels: int) -> Float[Array | np.ndarray, "*shape"]:
    """Pixel values 0…L − 1 as numbers in [-1, 1], without dequantization. Ho et al. (2020), section 3.3."""
    return images.astype(jnp.float32) / ((num_levels - 1) / 2) - 1.0


def to_levels(x: Float[Array, "*shape"], num_levels: int) -> UInt8[Array, "*shape"]:
    """The inverse of `to_unit`, rounded to the nearest pixel value."""
    return jnp.round((jnp.clip(x, -1.0, 1.0) + 1.0) * ((num_levels - 1) / 2)).astype(jnp.uint8)
