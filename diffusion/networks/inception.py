"""FID's Inception network of 2015-12-05: features of pictures, equal to those of the published TensorFlow graph.

Szegedy et al. (2015, arXiv 1512.00567), as Heusel et al. (2017) use it. It differs from the paper's network, and from
other ports of it, in four ways: average pools divide by the number of pixels inside the map, the last block's pool takes
the maximum, there are 1,008 logits, and pictures are resized as TensorFlow 1 does, without antialiasing.

    params = inception.load(inception.published_weights())
    inception.features(params, images)["2048"]
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree, UInt8

from diffusion.networks.inception_weights import digest, load, published_weights

__all__ = ["DIMENSIONS", "digest", "features", "load", "published_weights"]

# name -> length of the vector. The first three are means over a map of that many channels.
DIMENSIONS = {"64": 64, "192": 192, "768": 768, "2048": 2048, "logits_unbiased": 1008}
SIZE = 299  # of the square that every picture is resized to
# Images at a time. On a CPU a larger batch is no faster, and the rest of the last batch is computed for nothing.
BATCH_SIZE = {"cpu": 8}
BATCH_SIZE_OF_ACCELERATORS = 64
NHWC = ("NHWC", "HWIO", "NHWC")
# Accelerators multiply float32 in bfloat16 or TF32 unless they are told not to.
PRECISION = "highest"


def features(params: PyTree, images: np.ndarray | Array) -> dict[str, Float[np.ndarray, "n d"]]:
    """The features of pictures of any size, float32, by the names in DIMENSIONS.

    "2048" is what FID, KID, precision and recall are computed from. "logits_unbiased", the logits without their bias,
    give the Inception score.

    Args:
        params: of `load`.
        images: uint8 [n, h, w, 3], RGB.

    Raises:
        ValueError: the images are not uint8, or their shape is another.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"Inception takes uint8 images [n, h, w, 3], not {images.dtype} {list(images.shape)}")
    if 0 in images.shape[1:]:
        raise ValueError(f"Inception cannot resize images of {images.shape[1]}×{images.shape[2]} pixels")
    batch_size = BATCH_SIZE.get(jax.default_backend(), BATCH_SIZE_OF_ACCELERATORS)
    found = {name: np.empty((len(images), d), np.float32) for name, d in DIMENSIONS.items()}
    for start in range(0, len(images), batch_size):
        batch = np.asarray(images[start : start + batch_size])
        padding = batch_size - len(batch)  # so that a short batch is not another program
        padded = np.pad(batch, ((0, padding), (0, 0), (0, 0), (0, 0)))
        for name, values in _network(params, _resized(padded)).items():
            found[name][start : start + batch_size] = values[: len(batch)]
    return found


# A program of its own: the network is then compiled once for all sizes of images.
@jax.jit
def _resized(images: UInt8[Array, "n h w 3"]) -> Float[Array, "n {SIZE} {SIZE} 3"]:
    """Bilinear resizing as TensorFlow 1 does it (align_corners and half_pixel_centers false), then (x − 128) / 128."""
    x = images.astype(jnp.float32)
    for axis in (1, 2):
        x = _interpolated(x, axis)
    return (x - 128) / 128


def _interpolated(x: Float[Array, "n h w c"], axis: int) -> Float[Array, "n h2 w2 c"]:
    """The axis at SIZE positions i · length / SIZE, each between its two nearest pixels; the last pixel goes on."""
    length = x.shape[axis]
    # In float32, as in the published graph: in float64 a position may fall on the other side of a pixel.
    position = np.arange(SIZE, dtype=np.float32) * np.float32(length / SIZE)
    low = position.astype(int)
    high = np.minimum(low + 1, length - 1)
    shape = [SIZE if i == axis else 1 for i in range(4)]
    fraction = (position - low.astype(np.float32)).reshape(shape)
    x_low, x_high = jnp.take(x, low, axis), jnp.take(x, high, axis)
    return x_low + (x_high - x_low) * fraction


@jax.jit
def _network(params: PyTree, x: Float[Array, "n {SIZE} {SIZE} 3"]) -> dict[str, Float[Array, "n d"]]:
    found = {}
    with jax.default_matmul_precision(PRECISION):
        x = _conv(params["Conv2d_1a_3x3"], x, stride=2)
        x = _conv(params["Conv2d_2a_3x3"], x)
        x = _conv(params["Conv2d_2b_3x3"], x, padding="SAME")
        x = _max_pool(x)
        found["64"] = x.mean(axis=(1, 2))
        x = _conv(params["Conv2d_3b_1x1"], x)
        x = _conv(params["Conv2d_4a_3x3"], x)
        x = _max_pool(x)
        found["192"] = x.mean(axis=(1, 2))
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = _block_35(params[name], x)
        x = _reduction_17(params["Mixed_6a"], x)
        for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = _block_17(params[name], x)
        found["768"] = x.mean(axis=(1, 2))
        x = _reduction_8(params["Mixed_7a"], x)
        x = _block_8(params["Mixed_7b"], x, _average_pool)
        x = _block_8(params["Mixed_7c"], x, _max_pool_same)
        found["2048"] = x.mean(axis=(1, 2))
        found["logits_unbiased"] = found["2048"] @ params["fc"]
    return found


def _conv(layer, x, stride=1, padding="VALID"):
    x = lax.conv_general_dilated(x, layer["kernel"], (stride, stride), padding, dimension_numbers=NHWC)
    return jax.nn.relu(x + layer["bias"][None, None, None])


def _chain(block, prefix, x, suffixes):
    for suffix in suffixes:
        x = _conv(block[f"{prefix}_{suffix}"], x, padding="SAME")
    return x


def _max_pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")


def _max_pool_same(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")


def _average_pool(x):
    total = lax.reduce_window(x, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    count = lax.reduce_window(jnp.ones_like(x[:1, :, :, :1]), 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    return total / count


def _block_35(block, x):
    return jnp.concatenate(
        [
            _conv(block["branch1x1"], x),
            _chain(block, "branch5x5", x, "12"),
            _chain(block, "branch3x3dbl", x, "123"),
            _conv(block["branch_pool"], _average_pool(x)),
        ],
        axis=-1,
    )


def _reduction_17(block, x):
    double = _conv(block["branch3x3dbl_3"], _chain(block, "branch3x3dbl", x, "12"), stride=2)
    return jnp.concatenate([_conv(block["branch3x3"], x, stride=2), double, _max_pool(x)], axis=-1)


def _block_17(block, x):
    return jnp.concatenate(
        [
            _conv(block["branch1x1"], x),
            _chain(block, "branch7x7", x, "123"),
            _chain(block, "branch7x7dbl", x, "12345"),
            _conv(block["branch_pool"], _average_pool(x)),
        ],
        axis=-1,
    )


def _reduction_8(block, x):
    single = _conv(block["branch3x3_2"], _conv(block["branch3x3_1"], x), stride=2)
    factored = _conv(block["branch7x7x3_4"], _chain(block, "branch7x7x3", x, "123"), stride=2)
    return jnp.concatenate([single, factored, _max_pool(x)], axis=-1)


def _block_8(block, x, pool):
    single, double = _chain(block, "branch3x3", x, "1"), _chain(block, "branch3x3dbl", x, "12")
    return jnp.concatenate(
        [
            _conv(block["branch1x1"], x),
            _chain(block, "branch3x3", single, ["2a"]),
            _chain(block, "branch3x3", single, ["2b"]),
            _chain(block, "branch3x3dbl", double, ["3a"]),
            _chain(block, "branch3x3dbl", double, ["3b"]),
            _conv(block["branch_pool"], pool(x)),
        ],
        axis=-1,
    )
