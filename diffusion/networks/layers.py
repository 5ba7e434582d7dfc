"""What networks are built of: norm, attention, convolution, and the embeddings of t and of x."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Real

from diffusion.networks.convolution import winograd

# Accelerators multiply float32 in bfloat16 or TF32 unless they are told not to.
EXACT = {"precision": "highest"}

fan_avg = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
# Residual branches and the output start near zero; at exactly zero no gradient would pass behind them.
near_zero = nn.initializers.variance_scaling(1e-10, "fan_avg", "uniform")


def time_embedding(network_t: Real[Array, " b"], width: int) -> Float[Array, "b {width}"]:
    """sin and then cos of network_t * 10000^(-k / (width/2 - 1)) for k = 0 ... width/2 - 1, in float32.

    Vaswani et al. (2017), section 3.5, with the frequencies of Ho et al. (2020); `width` is even, at least 4.
    """
    half = width // 2
    frequencies = jnp.exp(-math.log(10000.0) / (half - 1) * jnp.arange(half, dtype=jnp.float32))
    angles = network_t.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def fourier_features(
    x: Float[Array, "b h w c"], exponents: tuple[int, ...]
) -> Float[Array, "b h w {x.shape[3]*(1+2*len(exponents))}"]:
    """x, then sin(2^n pi x) and cos(2^n pi x) for every n in `exponents`, as channels.

    They show the network the last bits of an almost clean x_t. Kingma et al. (2021, arXiv 2107.00630).
    """
    angles = [2.0**n * jnp.pi * x for n in exponents]
    return jnp.concatenate([x] + [wave(angle) for angle in angles for wave in (jnp.sin, jnp.cos)], axis=-1)


def halved(h: Float[Array, "b h w c"]) -> Float[Array, "b h_half w_half c"]:
    """The means over squares of 2 x 2."""
    batch, height, width, channels = h.shape
    return h.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


def doubled(h: Float[Array, "b h w c"]) -> Float[Array, "b h_twice w_twice c"]:
    """Each position four times, as a square of 2 x 2."""
    return h.repeat(2, axis=1).repeat(2, axis=2)


def patches(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b n p"]:
    """The squares of size × size pixels, row by row, each as one vector of its rows."""
    batch, height, width, channels = x.shape
    squares = x.reshape(batch, height // size, size, width // size, size, channels).transpose(0, 1, 3, 2, 4, 5)
    return squares.reshape(batch, -1, size * size * channels)


def image_of(tokens: Float[Array, "b n p"], size: int, height: int, width: int) -> Float[Array, "b {height} {width} c"]:
    """The image that `patches` makes these of."""
    squares = tokens.reshape(len(tokens), height // size, width // size, size, size, -1)
    return squares.transpose(0, 1, 3, 2, 4, 5).reshape(len(tokens), height, width, -1)


def needed_labels(network: nn.Module, labels: Int[Array, " b"] | None, batch_size: int) -> Int[Array, " b"]:
    """The labels that a network with classes was called with; only to be initialized it needs none."""
    if labels is not None:
        return labels
    if not network.is_initializing():
        raise ValueError(f"this network is given labels of {network.num_classes} classes: pass labels, -1 for none")
    return jnp.full(batch_size, -1)


class LabelEmbedding(nn.Module):
    """A learned vector for each class, and zero for a label that is none of 0 ... num_classes - 1, such as -1."""

    num_classes: int
    features: int
    initial_std: float = 1.0

    @nn.compact
    def __call__(self, labels: Int[Array, " b"]) -> Float[Array, "b {self.features}"]:
        table = self.param("embedding", nn.initializers.normal(self.initial_std), (self.num_classes, self.features))
        return jnp.matmul(jax.nn.one_hot(labels, self.num_classes), table, **EXACT)


class GroupNorm(nn.Module):
    """scale * (h - mean) / sqrt(variance + eps) + bias, with statistics over the map and a group's channels.

    Wu & He (2018), in float32. The variance takes a second pass, because E[h^2] - E[h]^2 cancels.
    """

    num_groups: int
    eps: float = 1e-6

    @nn.compact
    def __call__(self, h: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        features = h.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (features,))
        bias = self.param("bias", nn.initializers.zeros, (features,))

        centred, variance = centre(h.astype(jnp.float32), self.num_groups)
        factor = lax.rsqrt(variance + self.eps) * scale[None, None, None]
        return centred * factor + bias[None, None, None]


def centre(
    h: Float[Array, "b h w c"], num_groups: int
) -> tuple[Float[Array, "b h w c"], Float[Array, "b 1 1 c"]]:
    """h minus its mean over the map and a group's channels, and the variance there, each channel with its group's."""
    centred = h - group_mean(h, num_groups)
    return centred, group_mean(centred**2, num_groups)


def group_mean(h: Float[Array, "b h w c"], num_groups: int) -> Float[Array, "b 1 1 c"]:
    """The mean over the map and a group's channels, each channel with its group's."""
    # First over the map and then over the group: together they are 2.5 times slower on CPUs.
    of_groups = h.mean(axis=(1, 2)).reshape(len(h), num_groups, -1).mean(axis=-1)
    return jnp.repeat(of_groups, h.shape[-1] // num_groups, axis=-1)[:, None, None, :]


class Attention(nn.Module):
    """h + projection(softmax(q k^T / sqrt(channels per head)) v), over all h * w positions of norm(h)."""

    num_groups: int
    num_heads: int
    dtype: DTypeLike
    norm_eps: float = 1e-6

    @nn.compact
    def __call__(self, h: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        batch, height, width, channels = h.shape
        normed = GroupNorm(self.num_groups, self.norm_eps, name="norm")(h)
        query, key, value = (
            Dense(channels, dtype=self.dtype, name=name)(normed).reshape(
                batch, height * width, self.num_heads, channels // self.num_heads
            )
            for name in ("query", "key", "value")
        )
        attended = attend(query, key, value).reshape(h.shape)
        return h + Dense(channels, kernel_init=near_zero, dtype=self.dtype, name="projection")(attended)


def attend(
    query: Float[Array, "b q heads c"], key: Float[Array, "b k heads c"], value: Float[Array, "b k heads c"]
) -> Float[Array, "b q heads c"]:
    """softmax(q k^T / sqrt(c)) v in each head; the softmax in float32. Vaswani et al. (2017), eq. 1."""
    # Heads before positions: with positions first, XLA's products on CPUs take two to three times as long.
    query, key, value = (part.transpose(0, 2, 1, 3) for part in (query, key, value))
    logits = jnp.einsum("bhqc,bhkc->bhqk", query, key, preferred_element_type=jnp.float32)
    weights = nn.softmax(logits / math.sqrt(query.shape[-1])).astype(value.dtype)
    return jnp.einsum("bhqk,bhkc->bhqc", weights, value).transpose(0, 2, 1, 3)


def product_of_pixels(
    h: Float[Array, "*b c"], kernel: Float[Array, "c f"], dimension_numbers: tuple, **settings
) -> Float[Array, "*b f"]:
    """`lax.dot_general`, as `nn.Dense` calls it, with all axes before the channels made one.

    The gradient in the kernel is then a product of two matrices. With more axes XLA first makes a transposed copy of
    the output's gradient, which on CPUs takes up to as long as the product.
    """
    flat = lax.dot_general(h.reshape(-1, h.shape[-1]), kernel, (((1,), (0,)), ((), ())), **settings)
    return flat.reshape(*h.shape[:-1], kernel.shape[-1])


Dense = partial(nn.Dense, kernel_init=fan_avg, dot_general=product_of_pixels)
Conv = partial(nn.Conv, kernel_size=(3, 3), kernel_init=fan_avg)
# A network's field `convolution` -> its 3×3 convolutions.
CONVOLUTIONS = {"xla": Conv, "winograd": partial(Conv, conv_general_dilated=winograd)}


def conditioning_vector(
    network: nn.Module, of_time: Float[Array, "b d"], labels: Int[Array, " b"] | None
) -> Float[Array, "b features"]:
    """What every residual block is given: two layers of the time embedding, plus the vector of the label, if any.

    Args:
        network: whose modules these become; it has `channels` and `num_classes`.
        of_time: the cosines and sines.
    """
    embedding = Dense(4 * network.channels, **EXACT, name="time_1")(of_time)
    embedding = Dense(4 * network.channels, **EXACT, name="time_2")(nn.swish(embedding))
    if not network.num_classes:
        return embedding
    of_labels = LabelEmbedding(network.num_classes, 4 * network.channels, name="label")
    return embedding + of_labels(needed_labels(network, labels, len(of_time)))
