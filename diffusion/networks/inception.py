"""FID's Inception network of 2015-12-05: features of images, as torch-fidelity computes them.

It is the network of Szegedy et al. (2015, arXiv 1512.00567), as used by Heusel et al. (2017). It differs from the
paper's in four ways. Average pools divide by the number of pixels inside the map. The last block's pool takes the
maximum. There are 1,008 logits. Images are resized as in TensorFlow 1, without antialiasing.

    params = inception.load(inception.published_weights())
    inception.features(params, images)["2048"]
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree, UInt8

from diffusion.networks.inception_weights import digest, load, published_weights

__all__ = ["DIMENSIONS", "digest", "features", "load", "published_weights"]

# Name -> length of the vector. All but the logits are means over a map with this many channels.
DIMENSIONS = {"64": 64, "192": 192, "768": 768, "2048": 2048, "logits_unbiased": 1008}
SIZE = 299  # pixels; every image is resized to this square
NHWC = ("NHWC", "HWIO", "NHWC")
# Without it, accelerators multiply float32 numbers in bfloat16 or TF32.
PRECISION = "highest"

Map = Float[Array, "n h w c"]
Layer = dict[str, Array]  # kernel [h, w, inputs, outputs], bias [outputs]
Block = dict[str, Layer]


def features(params: PyTree, images: np.ndarray | Array, batch_size: int = 8) -> dict[str, Float[np.ndarray, "n d"]]:
    """The features of images of any size, float32, by the names in DIMENSIONS, in bounded memory.

    FID, KID, precision and recall are computed from "2048". The Inception score is computed from "logits_unbiased", the
    logits without their bias.

    Args:
        params: the result of `load`.
        images: uint8 [n, h, w, 3], RGB.
        batch_size: images at a time. More than eight are no faster on a CPU. The last batch is padded, at the cost of a
            full one.

    Raises:
        ValueError: the images are not uint8, or not of that shape.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
        raise ValueError(f"Inception takes uint8 images [n, h, w, 3], not {images.dtype} {list(images.shape)}")
    found = {name: np.empty((len(images), length), np.float32) for name, length in DIMENSIONS.items()}
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        missing = batch_size - len(batch)  # padded, or the last batch would need its own compiled program
        full = np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0)))
        for name, values in _network(params, _resized(full)).items():
            found[name][start : start + batch_size] = values[: len(batch)]
    return found


# Separate from the network, so that the network is compiled only once for images of all sizes.
@jax.jit
def _resized(images: UInt8[Array, "n h w 3"]) -> Float[Array, "n 299 299 3"]:
    """TensorFlow 1's bilinear resizing (align_corners and half_pixel_centers are false), then (x − 128) / 128."""
    x = images.astype(jnp.float32)
    for axis in (2, 1):
        x = _interpolated(x, axis)
    return (x - 128) / 128


def _interpolated(x: Map, axis: int) -> Float[Array, "n h2 w2 c"]:
    """`x` at the SIZE positions i · length / SIZE of one axis, interpolated between the two nearest pixels.

    Nothing is averaged when the image shrinks. Pixels lie at integers, not at their centres, so the image is shifted a
    little, and its last pixel is repeated beyond the end.
    """
    length = x.shape[axis]
    position = np.arange(SIZE, dtype=np.float32) * np.float32(length / SIZE)  # float32 as in the published graph
    before = np.floor(position).astype(int)
    after = np.minimum(before + 1, length - 1)
    along_axis = [SIZE if i == axis else 1 for i in range(x.ndim)]
    fraction = (position - np.floor(position)).reshape(along_axis)
    start = x.take(before, axis)
    return start + (x.take(after, axis) - start) * fraction


@jax.jit
def _network(params: PyTree, x: Float[Array, "n 299 299 3"]) -> dict[str, Float[Array, "n d"]]:
    found = {}
    with jax.default_matmul_precision(PRECISION):
        x = _conv(params["Conv2d_1a_3x3"], x, 2, "VALID")
        x = _conv(params["Conv2d_2a_3x3"], x, 1, "VALID")
        x = _conv(params["Conv2d_2b_3x3"], x)
        x = _max_pool(x)
        found["64"] = x.mean(axis=(1, 2))
        x = _conv(params["Conv2d_3b_1x1"], x)
        x = _conv(params["Conv2d_4a_3x3"], x, 1, "VALID")
        x = _max_pool(x)
        found["192"] = x.mean(axis=(1, 2))
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = _block_35(params[name], x)
        x = _to_17(params["Mixed_6a"], x)
        for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = _block_17(params[name], x)
        found["768"] = x.mean(axis=(1, 2))
        x = _to_8(params["Mixed_7a"], x)
        x = _block_8(params["Mixed_7b"], x, _average_pool)
        x = _block_8(params["Mixed_7c"], x, partial(_max_pool, stride=1, padding="SAME"))
        found["2048"] = x.mean(axis=(1, 2))
        found["logits_unbiased"] = found["2048"] @ params["fc"]
    return found


def _conv(layer: Layer, x: Map, stride: int = 1, padding: str = "SAME") -> Float[Array, "n h2 w2 c2"]:
    """max(0, convolution + bias); the batch norm is folded into both."""
    x = lax.conv_general_dilated(x, layer["kernel"], (stride, stride), padding, dimension_numbers=NHWC)
    return jax.nn.relu(x + layer["bias"][None, None, None])


def _convs(block: Block, names: Sequence[str], x: Map) -> Float[Array, "n h w c2"]:
    """Several convolutions, one after the other."""
    for name in names:
        x = _conv(block[name], x)
    return x


def _max_pool(x: Map, stride: int = 2, padding: str = "VALID") -> Float[Array, "n h2 w2 c"]:
    return _over_windows(lax.max, -jnp.inf, x, stride, padding)


def _average_pool(x: Map) -> Map:
    """The mean of the pixels of each window that lie inside the map."""
    count = _over_windows(lax.add, 0.0, jnp.ones((1, *x.shape[1:3], 1)), 1, "SAME")
    return _over_windows(lax.add, 0.0, x, 1, "SAME") / count


def _over_windows(
    reduce: Callable[[Array, Array], Array], empty: float, x: Map, stride: int, padding: str
) -> Float[Array, "n h2 w2 c"]:
    """Reduces 3×3 windows: three rows, then three columns. On CPUs that is 2 to 4 times as fast as both at once."""
    x = lax.reduce_window(x, empty, reduce, (1, 3, 1, 1), (1, stride, 1, 1), padding)
    return lax.reduce_window(x, empty, reduce, (1, 1, 3, 1), (1, 1, stride, 1), padding)


def _block_35(block: Block, x: Float[Array, "n 35 35 c"]) -> Float[Array, "n 35 35 c2"]:
    branches = [
        _conv(block["branch1x1"], x),
        _convs(block, ["branch5x5_1", "branch5x5_2"], x),
        _convs(block, ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"], x),
        _conv(block["branch_pool"], _average_pool(x)),
    ]
    return jnp.concatenate(branches, axis=-1)


def _to_17(block: Block, x: Float[Array, "n 35 35 288"]) -> Float[Array, "n 17 17 768"]:
    double = _convs(block, ["branch3x3dbl_1", "branch3x3dbl_2"], x)
    branches = [
        _conv(block["branch3x3"], x, 2, "VALID"),
        _conv(block["branch3x3dbl_3"], double, 2, "VALID"),
        _max_pool(x),
    ]
    return jnp.concatenate(branches, axis=-1)


def _block_17(block: Block, x: Float[Array, "n 17 17 768"]) -> Float[Array, "n 17 17 768"]:
    branches = [
        _conv(block["branch1x1"], x),
        _convs(block, [f"branch7x7_{i}" for i in (1, 2, 3)], x),
        _convs(block, [f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)], x),
        _conv(block["branch_pool"], _average_pool(x)),
    ]
    return jnp.concatenate(branches, axis=-1)


def _to_8(block: Block, x: Float[Array, "n 17 17 768"]) -> Float[Array, "n 8 8 1280"]:
    single = _conv(block["branch3x3_1"], x)
    factored = _convs(block, ["branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3"], x)
    branches = [
        _conv(block["branch3x3_2"], single, 2, "VALID"),
        _conv(block["branch7x7x3_4"], factored, 2, "VALID"),
        _max_pool(x),
    ]
    return jnp.concatenate(branches, axis=-1)


def _block_8(block: Block, x: Float[Array, "n 8 8 c"], pool: Callable[[Array], Array]) -> Float[Array, "n 8 8 2048"]:
    single = _conv(block["branch3x3_1"], x)
    double = _convs(block, ["branch3x3dbl_1", "branch3x3dbl_2"], x)
    branches = [
        _conv(block["branch1x1"], x),
        _conv(block["branch3x3_2a"], single),
        _conv(block["branch3x3_2b"], single),
        _conv(block["branch3x3dbl_3a"], double),
        _conv(block["branch3x3dbl_3b"], double),
        _conv(block["branch_pool"], pool(x)),
    ]
    return jnp.concatenate(branches, axis=-1)
