"""The 3×3 convolution by Winograd's F(2×2, 3×3), for CPUs: 4 multiplications per output instead of 9.

Lavin & Gray (2016, arXiv 1509.09308), section 4.1. The map is cut into tiles d of 4×4 pixels, two pixels apart. Each
tile of one channel and the kernel g give four outputs,

    Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A.

Over all channels ⊙ becomes sixteen matrix products, one for each place in a tile. B and A contain only 0 and ±1, so
pixels are only added or subtracted. This happens while they are gathered, because XLA's slices and concatenations of
the same maps take longer on CPUs.

The kernel's gradient becomes sixteen products of the same tiles. The convolution is linear in the map and the kernel,
and this gradient is linear in the map and the output's gradient. Each is the other's derivative. Both are primitives of
JAX, so derivatives of any order use only these two. Otherwise JAX would transpose a gather, which is a slow scatter.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

# With fewer channels XLA's own convolution and its kernel gradient are as fast.
MIN_CHANNELS, MIN_CHANNELS_OF_GRADIENT = 64, 16
# Row i of Bᵀ d is d[FIRST[i]] + SIGN[i] d[SECOND[i]].
FIRST, SECOND, SIGN = np.array([0, 1, 2, 1]), np.array([2, 2, 1, 3]), np.float32([-1, 1, -1, -1])
G = np.float32([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
A = np.float32([[1, 0], [1, 1], [1, -1], [0, -1]])


def winograd(lhs, rhs, window_strides, padding, **settings):
    """Replaces `lax.conv_general_dilated` in `nn.Conv`. It uses `conv_3x3` for dense "SAME" 3×3 ones in float32."""
    is_3x3 = window_strides == (1, 1) and padding == "SAME" and rhs.shape[:2] == (3, 3)
    dilations = [settings.get(name) or (1, 1) for name in ("lhs_dilation", "rhs_dilation")]
    is_dense = rhs.shape[2] == lhs.shape[3] and all(tuple(dilation) == (1, 1) for dilation in dilations)
    is_float32 = lhs.dtype == rhs.dtype == jnp.float32
    # XLA computes single images, because `describe.forward_flops` lets XLA count the operations of one.
    is_batch = lhs.shape[0] > 1
    is_tiled = lhs.shape[1] % 2 == lhs.shape[2] % 2 == 0
    is_wide = min(rhs.shape[2:]) >= MIN_CHANNELS_OF_GRADIENT
    if is_3x3 and is_dense and is_float32 and is_batch and is_tiled and is_wide:
        return conv_3x3(lhs, rhs)
    return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **settings)


def conv_3x3(x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c f"]) -> Float[Array, "b h w f"]:
    """The convolution in float32 with zeros around the map; h and w are even."""
    return CONVOLUTION.bind(x, kernel)


def kernel_gradient(x: Float[Array, "b h w c"], g: Float[Array, "b h w f"]) -> Float[Array, "3 3 c f"]:
    """The kernel's gradient from the output's gradient g: entry i, j is Σ_{v,u} x[v+i-1, u+j-1] ⊗ g[v, u]."""
    return KERNEL_GRADIENT.bind(x, g)


def turned(kernel: Float[Array, "3 3 c f"]) -> Float[Array, "3 3 f c"]:
    """The kernel of the convolution's transpose with respect to the map."""
    return kernel[::-1, ::-1].swapaxes(2, 3)


def _conv(x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c f"]) -> Float[Array, "b h w f"]:
    if min(kernel.shape[2:]) < MIN_CHANNELS:
        return _conv_by_xla(x, kernel)
    kernels = (np.kron(G, G) @ kernel.reshape(9, -1)).reshape(16, *kernel.shape[2:])
    products = jnp.einsum("npc,ncf->npf", _tiles(x), kernels)
    return _outputs(products.reshape(4, 4, len(x), x.shape[1] // 2, x.shape[2] // 2, -1))


def _conv_by_xla(x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c f"]) -> Float[Array, "b h w f"]:
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _kernel_gradient(x: Float[Array, "b h w c"], g: Float[Array, "b h w f"]) -> Float[Array, "3 3 c f"]:
    products = _contracted(_tiles(x), _spread(g))
    return (np.kron(G, G).T @ products.reshape(16, -1)).reshape(3, 3, *products.shape[1:])


def _contracted(tiles: Float[Array, "16 n c"], spread: Float[Array, "16 n f"]) -> Float[Array, "16 c f"]:
    """The sums over n of their outer products.

    The factor with fewer channels is the product's first: XLA on CPUs takes up to twice as long if it is the second.
    Without the barrier XLA would turn the product back.
    """
    if tiles.shape[-1] <= spread.shape[-1]:
        return jnp.einsum("npc,npf->ncf", tiles, spread)
    return lax.optimization_barrier(jnp.einsum("npf,npc->nfc", spread, tiles)).swapaxes(1, 2)


def _kernel_gradient_by_xla(x: Float[Array, "b h w c"], g: Float[Array, "b h w f"]) -> Float[Array, "3 3 c f"]:
    kernel = jax.ShapeDtypeStruct((3, 3, x.shape[-1], g.shape[-1]), x.dtype)
    (gradient,) = jax.linear_transpose(lambda kernel: _conv_by_xla(x, kernel), kernel)(g)
    return gradient


def _tiles(x: Float[Array, "b h w c"]) -> Float[Array, "16 n c"]:
    """Bᵀ d B of all tiles."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    by_row, by_column = SIGN.reshape(1, 4, 1, 1, 1, 1), SIGN.reshape(1, 1, 4, 1, 1, 1)

    def at(rows: np.ndarray, columns: np.ndarray) -> Float[Array, "b 4 4 y x c"]:
        return _gathered(padded, rows, columns, x.shape)

    first = at(FIRST, FIRST) + by_row * at(SECOND, FIRST)
    second = at(FIRST, SECOND) + by_row * at(SECOND, SECOND)
    return (first + by_column * second).transpose(1, 2, 0, 3, 4, 5).reshape(16, -1, x.shape[-1])


def _gathered(maps: Array, rows: np.ndarray, columns: np.ndarray, shape: tuple[int, ...]) -> Array:
    """[b, i, j, p, q, c]: the pixel in rows[i], columns[j] of tile p, q, for maps of this shape."""
    y, x = 2 * np.arange(shape[1] // 2) + rows[:, None], 2 * np.arange(shape[2] // 2) + columns[:, None]
    return maps[:, y[:, None, :, None], x[None, :, None, :]]


def _spread(g: Float[Array, "b h w f"]) -> Float[Array, "16 n f"]:
    """A y Aᵀ for the four output pixels y of every tile."""

    def at(row: int, column: int) -> Float[Array, "b 4 4 y x f"]:
        sign = A[:, row].reshape(1, 4, 1, 1, 1, 1) * A[:, column].reshape(1, 1, 4, 1, 1, 1)
        return sign * _gathered(g, np.full(4, row), np.full(4, column), g.shape)

    spread = at(0, 0) + at(0, 1) + at(1, 0) + at(1, 1)
    return spread.transpose(1, 2, 0, 3, 4, 5).reshape(16, -1, g.shape[-1])


def _outputs(products: Float[Array, "4 4 b p q f"]) -> Float[Array, "b 2*p 2*q f"]:
    """Aᵀ m A of all tiles, joined into a map."""
    y, x = np.arange(2 * products.shape[3])[:, None], np.arange(2 * products.shape[4])[None, :]

    def term(i: int, j: int) -> Array:
        """Term i, j of each output's sum. A column of A has three entries that are not 0."""
        row, column = i + y % 2, j + x % 2
        sign = A[row, y % 2] * A[column, x % 2]
        return sign[..., None, None] * products[row, column, :, y // 2, x // 2]

    return sum(term(i, j) for i in range(3) for j in range(3)).transpose(2, 0, 1, 3)


def _primitive(name: str, function: Callable[..., Array], by_xla: Callable[..., Array]) -> Primitive:
    """A JAX primitive for a function of two arrays. Under `vmap` it is `by_xla`.

    XLA keeps it as a separate call and fuses nothing into it or out of it. Otherwise it would recompute the inputs
    each time a pixel is gathered, and the outputs for each use.
    """
    compiled = jax.jit(function)

    def call(*arrays: Array) -> Array:
        with set_xla_metadata(inlineable="false"):
            return compiled(*arrays)

    primitive = Primitive(name)
    primitive.def_impl(compiled)
    primitive.def_abstract_eval(lambda *arrays: jax.typeof(jax.eval_shape(function, *arrays)))
    mlir.register_lowering(primitive, mlir.lower_fun(call, multiple_results=False))
    batching.primitive_batchers[primitive] = lambda arrays, axes: (jax.vmap(by_xla, axes)(*arrays), 0)
    return primitive


CONVOLUTION = _primitive("conv_3x3", _conv, _conv_by_xla)
KERNEL_GRADIENT = _primitive("conv_3x3_kernel_gradient", _kernel_gradient, _kernel_gradient_by_xla)
# The gradients of each with respect to its first and second argument, from the result's cotangent.
ad.defbilinear(
    CONVOLUTION,
    lambda g, _, kernel: conv_3x3(g, turned(kernel)),
    lambda g, x, _: kernel_gradient(x, g),
)
ad.defbilinear(
    KERNEL_GRADIENT,
    lambda kernel, _, g: conv_3x3(g, turned(kernel)),
    lambda kernel, x, _: conv_3x3(x, kernel),
)
