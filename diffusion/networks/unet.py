"""The U-Net of Ho et al. (2020), appendix B: what the reverse process asks for its mean (and its variance).

    x_t -- conv -- down levels -- middle -- up levels -- norm, swish, conv -- output
                        `--- skip connections ---'

Level i works on maps of height H / 2^i with channels * multipliers[i] channels. It has `blocks` residual
blocks going down and one more going up; each block going up also reads one of the maps kept on the way down.
"""

import math
import zlib
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, Real

from diffusion import convolution

fan_avg = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
# Residual branches and the output start near zero; at exactly zero no gradient would pass behind them.
near_zero = nn.initializers.variance_scaling(1e-10, "fan_avg", "uniform")

Dense = partial(nn.Dense, kernel_init=fan_avg)
Conv = partial(nn.Conv, kernel_size=(3, 3), kernel_init=fan_avg, conv_general_dilated=convolution.conv_general_dilated)
# Accelerators multiply float32 in bfloat16 or TF32 unless they are told not to.
EXACT = {"precision": "highest"}


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


class GroupNorm(nn.Module):
    """scale * (h - mean) / sqrt(variance + 1e-6) + bias, with statistics over the map and a group's channels.

    Wu & He (2018), in float32. The variance takes a second pass, because E[h^2] - E[h]^2 cancels.
    """

    groups: int

    @nn.compact
    def __call__(self, h: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        features = h.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (features,))
        bias = self.param("bias", nn.initializers.zeros, (features,))

        def mean(h: Float[Array, "b h w c"]) -> Float[Array, "b 1 1 c"]:
            # First over the map and then over the group: together they are 2.5 times slower on CPUs.
            of_groups = h.mean(axis=(1, 2)).reshape(len(h), self.groups, -1).mean(axis=-1)
            return jnp.repeat(of_groups, features // self.groups, axis=-1)[:, None, None, :]

        h = h.astype(jnp.float32)
        centred = h - mean(h)
        factor = lax.rsqrt(mean(centred**2) + 1e-6) * scale[None, None, None]
        return centred * factor + bias[None, None, None]


def dropout(h: Float[Array, "b h w c"], rate: float, keys: Key[Array, " b"]) -> Float[Array, "b h w c"]:
    """h with each number set to zero at this rate, the others scaled so that the mean stays; a key for each example.

    16 bits decide on a number: half the work of deciding by 32, which on CPUs is a tenth of a train step.
    """
    dropped = round(rate * 2**16)
    kept = jax.vmap(lambda key: jax.random.bits(key, h.shape[1:], "uint16"))(keys) >= dropped
    return jnp.where(kept, h / (1 - dropped / 2**16), 0).astype(h.dtype)


class ResidualBlock(nn.Module):
    """h + conv(dropout(swish(norm(conv(swish(norm(h))) + embedding)))), h projected if its width changes.

    With `scale_shift` the embedding scales and shifts what the second norm returns instead
    (Nichol & Dhariwal, 2021).
    """

    features: int
    groups: int
    dropout: float
    scale_shift: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, h: Float[Array, "b h w c"], embedding: Float[Array, "b e"], dropout_keys: Key[Array, " b"] | None
    ) -> Float[Array, "b h w {self.features}"]:
        shortcut = h
        if h.shape[-1] != self.features:
            shortcut = Dense(self.features, dtype=self.dtype, name="shortcut")(h)
        time_features = 2 * self.features if self.scale_shift else self.features
        time = Dense(time_features, dtype=self.dtype, name="time")(nn.swish(embedding))[:, None, None, :]

        h = nn.swish(GroupNorm(self.groups, name="norm_1")(h))
        h = Conv(self.features, dtype=self.dtype, name="conv_1")(h)
        if not self.scale_shift:
            h = h + time
        h = GroupNorm(self.groups, name="norm_2")(h)
        if self.scale_shift:
            scale, shift = jnp.split(time.astype(jnp.float32), 2, axis=-1)
            h = h * (1.0 + scale) + shift
        h = nn.swish(h).astype(self.dtype)
        if dropout_keys is not None:
            own = zlib.crc32(self.name.encode())
            h = dropout(h, self.dropout, jax.vmap(lambda key: jax.random.fold_in(key, own))(dropout_keys))
        h = Conv(self.features, kernel_init=near_zero, dtype=self.dtype, name="conv_2")(h)
        return shortcut + h


class Attention(nn.Module):
    """h + projection(softmax(q k^T / sqrt(channels per head)) v), over all h * w positions of norm(h)."""

    groups: int
    heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, h: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        batch, height, width, channels = h.shape
        normed = GroupNorm(self.groups, name="norm")(h)
        query, key, value = (
            Dense(channels, dtype=self.dtype, name=name)(normed).reshape(
                batch, height * width, self.heads, channels // self.heads
            )
            for name in ("query", "key", "value")
        )
        logits = jnp.einsum("bqhc,bkhc->bhqk", query, key, preferred_element_type=jnp.float32)
        weights = nn.softmax(logits / math.sqrt(channels // self.heads)).astype(self.dtype)
        attended = jnp.einsum("bhqk,bkhc->bqhc", weights, value).reshape(h.shape)
        return h + Dense(channels, kernel_init=near_zero, dtype=self.dtype, name="projection")(attended)


class UNet(nn.Module):
    """The network; the default fields are Ho et al.'s for CIFAR-10: 35,746,307 parameters.

    unet.apply({"params": params}, x, network_t, train=False, dropout_keys=None, rngs={"dropout": key})

    Attributes:
      channels: width of the first level; the time embedding is made of `channels` sines and cosines.
      multipliers: the width of each level, in units of `channels`; the map is halved between levels.
      blocks: residual blocks per level on the way down; there is one more per level on the way up.
      attention_resolutions: heights of the map at which every block is followed by attention. Attention
        between the two blocks in the middle is always there.
      groups: groups of every group normalization.
      heads: heads of every attention; they share the channels out between them.
      dropout: probability with which `train=True` drops an activation; that needs dropout_keys, one for each
        example, or the "dropout" key, from which they are then split.
      scale_shift: the time embedding scales and shifts a block's second norm instead of being added before.
      fourier_features: exponents n for which sin and cos of 2^n pi x join the input; () for none.
      out_channels: channels of the output.
      dtype: "float32" or "bfloat16": what the maps and matrix products are computed in. Parameters, norms,
        softmax, time embedding and the first and last convolution are float32. (On accelerators "float32" multiplies
        the rest at the default precision of JAX, which may be TF32; see jax_default_matmul_precision.)
      remat: recompute the residual blocks in the backward pass instead of keeping their insides: less memory
        for one more forward pass.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    groups: int = 32
    heads: int = 1
    dropout: float = 0.1
    scale_shift: bool = False
    fourier_features: tuple[int, ...] = ()
    out_channels: int = 3
    dtype: DTypeLike = "float32"
    remat: bool = False

    def check(self, image_shape: tuple[int, ...]) -> None:
        """Raise a ValueError that names the config key if these fields do not fit images of [H, W, C]."""
        height, width, _ = image_shape
        halvings = len(self.multipliers) - 1
        heights = [height // 2**level for level in range(len(self.multipliers))]
        # `channels` itself is the width of the first convolution, which the last block going up reads again.
        widths = sorted({self.channels, *(self.channels * multiplier for multiplier in self.multipliers)})
        if height % 2**halvings or width % 2**halvings:
            raise ValueError(
                f"unet.multipliers={self.multipliers} halves images {halvings} times, so height and width "
                f"must be multiples of {2**halvings}, not {height}x{width}."
            )
        if self.channels < 4 or self.channels % 2:
            raise ValueError(f"unet.channels={self.channels} must be even and at least 4.")
        if self.groups < 1 or any(features % self.groups for features in widths):
            raise ValueError(f"unet.groups={self.groups} must divide the width of every map, {widths}.")
        if self.heads < 1 or any(features % self.heads for features in widths):
            raise ValueError(f"unet.heads={self.heads} must divide the width of every map, {widths}.")
        if not set(self.attention_resolutions) <= set(heights):
            raise ValueError(
                f"unet.attention_resolutions={self.attention_resolutions} may only name heights of the "
                f"{height}x{width} image's levels, {heights}."
            )

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        network_t: Real[Array, " b"],
        train: bool = False,
        dropout_keys: Key[Array, " b"] | None = None,
    ) -> Float[Array, "b h w {self.out_channels}"]:
        """The network's output for noisy images x and the number each is conditioned on (0 ... T - 1)."""
        self.check(x.shape[1:])
        if not train or not self.dropout:
            dropout_keys = None
        elif dropout_keys is None:
            dropout_keys = jax.random.split(self.make_rng("dropout"), len(x))
        residual_block = nn.remat(ResidualBlock) if self.remat else ResidualBlock
        settings = {"groups": self.groups, "dropout": self.dropout, "scale_shift": self.scale_shift}
        block = partial(residual_block, dtype=self.dtype, **settings)
        attention = partial(Attention, self.groups, self.heads, self.dtype)
        last_level = len(self.multipliers) - 1

        embedding = Dense(4 * self.channels, **EXACT, name="time_1")(time_embedding(network_t, self.channels))
        embedding = Dense(4 * self.channels, **EXACT, name="time_2")(nn.swish(embedding))

        # In float32, as the last convolution: bfloat16 would blur the grey levels of an almost clean image.
        h = Conv(self.channels, **EXACT, name="conv_in")(fourier_features(x, self.fourier_features)).astype(self.dtype)
        skips = [h]
        for level, multiplier in enumerate(self.multipliers):
            for i in range(self.blocks):
                h = block(self.channels * multiplier, name=f"down_{level}_block_{i}")(h, embedding, dropout_keys)
                if h.shape[1] in self.attention_resolutions:
                    h = attention(name=f"down_{level}_attention_{i}")(h)
                skips.append(h)
            if level < last_level:
                # TensorFlow's SAME: an even map is padded at its bottom and right only.
                padding = ((0, 1), (0, 1))
                name = f"down_{level}_downsample"
                h = Conv(h.shape[-1], strides=2, padding=padding, dtype=self.dtype, name=name)(h)
                skips.append(h)

        h = block(h.shape[-1], name="mid_block_0")(h, embedding, dropout_keys)
        h = attention(name="mid_attention")(h)
        h = block(h.shape[-1], name="mid_block_1")(h, embedding, dropout_keys)

        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            for i in range(self.blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(self.channels * multiplier, name=f"up_{level}_block_{i}")(h, embedding, dropout_keys)
                if h.shape[1] in self.attention_resolutions:
                    h = attention(name=f"up_{level}_attention_{i}")(h)
            if level > 0:
                h = h.repeat(2, axis=1).repeat(2, axis=2)
                h = Conv(h.shape[-1], dtype=self.dtype, name=f"up_{level}_upsample")(h)

        h = nn.swish(GroupNorm(self.groups, name="norm_out")(h))
        return Conv(self.out_channels, kernel_init=near_zero, **EXACT, name="conv_out")(h)
