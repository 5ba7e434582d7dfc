"""The best linear denoiser of images with a given spectrum, a Wiener filter, as a function without parameters.

How far pixels must be averaged depends on the noise. A network of 3×3 convolutions has to learn it for every noise
level; this filter knows it. Its estimate of v joins the network's input.

The variance of a cosine of an image falls with a power of its frequency. For photographs the power is about 2 (Field
1987), and what remains after grey is small.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

PIXEL_VARIANCE = 0.25  # of photographs in [-1, 1]; the square of EDM's σ_data
# Grey, red less blue, and green less both: orthonormal rows.
COLOURS = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])


def wiener_v(
    x: Float[Array, "b h w c"], gamma: Float[Array, " b"], power: float, chroma: float
) -> Float[Array, "b h w c"]:
    """The linear estimate of v = √ᾱ ε − √(1−ᾱ) x_0 from x_t with the least squared error.

    It is E[v | x_t] for Gaussian images with the variances S of `spectrum`: of each cosine and colour of x_t,
    √(ᾱ (1−ᾱ)) (1 − S)/(ᾱ S + 1 − ᾱ) times it.

    Args:
        x: images x_t with noise.
        gamma: −log SNR_t of each.
        power, chroma: see `spectrum`.
    """
    rows, columns, colours = _cosines(x.shape[1]), _cosines(x.shape[2]), _colours(x.shape[3])
    alpha_bar, noise = (jax.nn.sigmoid(sign * gamma)[:, None, None, None] for sign in (-1, 1))
    variance = spectrum(x.shape[1:], power, chroma)[None]
    gain = jnp.sqrt(alpha_bar * noise) * (1 - variance) / (alpha_bar * variance + noise)
    transform = functools.partial(jnp.einsum, precision="highest")  # accelerators would multiply with ten bits
    coefficients = transform("kh,lw,dc,bhwc->bkld", rows, columns, colours, x)
    return transform("kh,lw,dc,bkld->bhwc", rows, columns, colours, gain * coefficients)


def check_wiener(fields: tuple[float, ...]) -> None:
    """Raises a ValueError that names the config key if these are not () or (power, chroma)."""
    if fields and not (len(fields) == 2 and 0 <= fields[0] <= 8 and 0 < fields[1] <= 1):
        raise ValueError(f"unet.wiener={fields} must be (power, chroma) with power in [0, 8], chroma in (0, 1], or ()")


@functools.lru_cache(maxsize=4)
def spectrum(shape: tuple[int, int, int], power: float, chroma: float) -> Float[np.ndarray, "h w c"]:
    """The variance of each cosine of images [H, W, C]: (1 + i² + j²)^(−power/2), for C = 3 of each colour.

    i and j count half periods per height. The mean is PIXEL_VARIANCE, which is then the variance of a pixel.

    Args:
        shape: (H, W, C).
        power: how the variance falls with the frequency; 0 for white images.
        chroma: the variance of the other two colours, relative to grey.
    """
    height, width, channels = shape
    i, j = np.arange(height)[:, None], np.arange(width) * height / width
    falling = (1.0 + i**2 + j**2) ** (-power / 2)
    variance = falling[..., None] * (np.array([1, chroma, chroma]) if channels == 3 else np.ones(channels))
    return (PIXEL_VARIANCE * variance / variance.mean()).astype(np.float32)


@functools.lru_cache(maxsize=4)
def _cosines(size: int) -> Float[np.ndarray, "{size} {size}"]:
    """The rows of the orthonormal discrete cosine transform (DCT-II)."""
    cosines = np.cos(np.pi * np.arange(size)[:, None] * (np.arange(size) + 0.5) / size)
    return (cosines / np.linalg.norm(cosines, axis=1, keepdims=True)).astype(np.float32)


def _colours(channels: int) -> Float[np.ndarray, "{channels} {channels}"]:
    return (COLOURS if channels == 3 else np.eye(channels)).astype(np.float32)
