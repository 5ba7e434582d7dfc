"""The U-Net of Ho et al. (2020), appendix B: what the reverse process asks for its mean (and its variance).

    x_t -- conv -- down levels -- middle -- up levels -- norm, swish, conv -- output
                        `--- skip connections ---'

Level i works on maps of height H / 2^i with channels * channel_mult[i] channels. It has `num_res_blocks` residual
blocks going down and one more going up; each block going up also reads one of the maps kept on the way down.
"""

import zlib
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key, Real

from diffusion.networks.dropout import dropout
from diffusion.networks.layers import (
    CONVOLUTIONS,
    EXACT,
    Attention,
    Dense,
    GroupNorm,
    conditioning_vector,
    doubled,
    fourier_features,
    image_of,
    near_zero,
    patches,
    time_embedding,
)
from diffusion.networks.wiener import check_wiener, wiener_v

# Far above any published network: what is larger is a typing error that would compile for hours.
MAX_WIDTH, MAX_BLOCKS, MAX_EXPONENT = 2**16, 256, 24


class ResidualBlock(nn.Module):
    """h + conv(dropout(swish(norm(conv(swish(norm(h))) + embedding)))), h projected if its width changes.

    With `scale_shift_norm` the embedding scales and shifts what the second norm returns instead
    (Nichol & Dhariwal, 2021). With `resample`, such as `layers.halved`, the map changes its size before the first
    convolution and in the shortcut (Brock et al., 2019, BigGAN).
    """

    features: int
    num_groups: int
    dropout: float
    scale_shift_norm: bool
    dtype: str
    convolution: str = "xla"
    norm_eps: float = 1e-6
    resample: Callable[[Array], Array] | None = None

    @nn.compact
    def __call__(
        self, h: Float[Array, "b h w c"], embedding: Float[Array, "b e"], dropout_keys: Key[Array, " b"] | None
    ) -> Float[Array, "b h_out w_out {self.features}"]:
        conv = CONVOLUTIONS[self.convolution]
        shortcut = h if self.resample is None else self.resample(h)
        if h.shape[-1] != self.features:
            shortcut = Dense(self.features, dtype=self.dtype, name="shortcut")(shortcut)
        time_features = 2 * self.features if self.scale_shift_norm else self.features
        time = Dense(time_features, dtype=self.dtype, name="time")(nn.swish(embedding))[:, None, None, :]

        h = nn.swish(GroupNorm(self.num_groups, self.norm_eps, name="norm_1")(h))
        h = h if self.resample is None else self.resample(h)
        h = conv(self.features, dtype=self.dtype, name="conv_1")(h)
        if not self.scale_shift_norm:
            h = h + time
        h = GroupNorm(self.num_groups, self.norm_eps, name="norm_2")(h)
        if self.scale_shift_norm:
            scale, shift = jnp.split(time.astype(jnp.float32), 2, axis=-1)
            h = h * (1.0 + scale) + shift
        h = nn.swish(h).astype(self.dtype)
        if dropout_keys is not None:
            own = zlib.crc32(self.name.encode())
            h = dropout(h, self.dropout, jax.vmap(lambda key: jax.random.fold_in(key, own))(dropout_keys))
        h = conv(self.features, kernel_init=near_zero, dtype=self.dtype, name="conv_2")(h)
        return shortcut + h


class UNet(nn.Module):
    """The network; the default fields are Ho et al.'s for CIFAR-10: 35,746,307 parameters.

    unet.apply({"params": params}, x, network_t, dropout_keys=None, labels=None)

    Attributes:
      patch_size: height and width of the squares of pixels that become one position of the first level's map. Their
        pixels are its channels, in the input and in the output; 1 for a position for each pixel.
      channels: width of the first level; the time embedding is made of `channels` sines and cosines.
      channel_mult: the width of each level, in units of `channels`; the map is halved between levels.
      num_res_blocks: residual blocks per level on the way down; there is one more per level on the way up.
      attention_resolutions: heights of the map at which every block is followed by attention. Attention
        between the two blocks in the middle is `mid_attention`'s.
      mid_attention: whether there is attention between the two blocks in the middle.
      num_groups: groups of every group normalization.
      norm_eps: what every group normalization adds to the variance. Ho et al.'s program adds 1e-6, PyTorch 1e-5.
      num_heads: heads of every attention; they share the channels out between them.
      dropout: probability with which an activation is dropped where dropout_keys are given.
      scale_shift_norm: the time embedding scales and shifts a block's second norm instead of being added before.
      fourier_features: exponents n for which sin and cos of 2^n pi x join the input; () for none.
      wiener: (power, chroma) of the spectrum by which a linear estimate of v joins the input; () for none. See
        networks/wiener.py. It needs `gamma_line`.
      add_input: whether the output is what the layers make of x plus x itself, as in VDM's program, whose network is
        then asked for epsilon - x_t.
      num_classes: of the labels that the network is given, each with a learned vector that is added to the time
        embedding; 0 for a network that is given none.
      out_channels: channels of the output.
      gamma_line: (a, b) where -log SNR is a + b network_t; () where network_t does not determine it.
      convolution: what computes the 3×3 convolutions: XLA, or Winograd's algorithm (networks/convolution.py), which
        is faster on CPUs.
      dtype: what the maps and matrix products are computed in. Parameters, norms, softmax, time embedding and the
        first and last convolution are float32. (On accelerators "float32" multiplies the rest at the default
        precision of JAX, which may be TF32; see jax_default_matmul_precision.)
      remat: recompute the residual blocks in the backward pass instead of keeping their insides: less memory
        for one more forward pass.
    """

    patch_size: int = 1
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    mid_attention: bool = True
    num_groups: int = 32
    norm_eps: float = 1e-6
    num_heads: int = 1
    dropout: float = 0.1
    scale_shift_norm: bool = False
    fourier_features: tuple[int, ...] = ()
    wiener: tuple[float, ...] = ()
    add_input: bool = False
    num_classes: int = 0
    out_channels: int = 3
    gamma_line: tuple[float, ...] = ()
    convolution: Literal["xla", "winograd"] = "xla"
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False

    def check(self, image_shape: tuple[int, ...]) -> None:
        """Raises a ValueError that names the config key if these fields do not fit images of [H, W, C]."""
        height, width, _ = image_shape
        halvings = len(self.channel_mult) - 1
        if not 1 <= self.patch_size <= MAX_WIDTH:
            raise ValueError(f"unet.patch_size={self.patch_size} must be in 1…{MAX_WIDTH}")
        if not 4 <= self.channels <= MAX_WIDTH or self.channels % 2:
            raise ValueError(f"unet.channels={self.channels} must be even and in 4…{MAX_WIDTH}")
        if halvings < 0 or min(self.channel_mult) < 1 or self.channels * max(self.channel_mult) > MAX_WIDTH:
            raise ValueError(
                f"unet.channel_mult={self.channel_mult} must be integers ≥ 1, at least one, and no map wider than "
                f"{MAX_WIDTH} channels"
            )
        if not 1 <= self.num_res_blocks <= MAX_BLOCKS:
            raise ValueError(f"unet.num_res_blocks={self.num_res_blocks} must be in 1…{MAX_BLOCKS}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"unet.dropout={self.dropout} must be in [0, 1)")
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"unet.norm_eps={self.norm_eps} must be in (0, 1)")
        if not all(0 <= exponent <= MAX_EXPONENT for exponent in self.fourier_features):
            raise ValueError(f"unet.fourier_features={self.fourier_features} must be in 0…{MAX_EXPONENT}, or ()")
        check_wiener(self.wiener)
        if self.wiener and not self.gamma_line:
            raise ValueError(
                f"unet.wiener={self.wiener} filters for the noise in x_t, which only a network with "
                "model.conditioning='gamma' is told"
            )
        multiple = self.patch_size * 2**halvings
        if height % multiple or width % multiple:
            raise ValueError(
                f"unet.channel_mult={self.channel_mult} halves images {halvings} times and unet.patch_size="
                f"{self.patch_size} divides them, so height and width must be multiples of {multiple}, not "
                f"{height}×{width}"
            )
        # `channels` itself is the width of the first convolution, which the last block going up reads again.
        widths = sorted({self.channels, *(self.channels * factor for factor in self.channel_mult)})
        for name, count in {"num_groups": self.num_groups, "num_heads": self.num_heads}.items():
            if count < 1 or any(features % count for features in widths):
                raise ValueError(f"unet.{name}={count} must divide the width of every map, {widths}")
        heights = [height // self.patch_size // 2**level for level in range(len(self.channel_mult))]
        if not set(self.attention_resolutions) <= set(heights):
            raise ValueError(
                f"unet.attention_resolutions={self.attention_resolutions} may only name heights of the "
                f"{height}×{width} image's levels, {heights}"
            )

    @property
    def _conv(self) -> Callable[..., nn.Module]:
        return CONVOLUTIONS[self.convolution]

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        network_t: Real[Array, " b"],
        dropout_keys: Key[Array, " b"] | None = None,
        labels: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b h w {self.out_channels}"]:
        """The network's output for noisy images x and the number each is conditioned on (0 ... T - 1).

        Dropout needs a key for each example; without keys nothing is dropped. A network with classes needs a label for
        each example, -1 for none, but not to be initialized.
        """
        self.check(x.shape[1:])
        embedding = conditioning_vector(self, time_embedding(network_t, self.channels), labels)
        residual_block = nn.remat(ResidualBlock) if self.remat else ResidualBlock

        def block(h: Array, features: int, name: str) -> Array:
            fields = (features, self.num_groups, self.dropout, self.scale_shift_norm)
            fields += (self.dtype, self.convolution, self.norm_eps)
            return residual_block(*fields, name=name)(h, embedding, dropout_keys if self.dropout else None)

        # In float32, as the last convolution: bfloat16 would blur the pixel values of an almost clean image.
        tokens = patches(self._input(x, network_t), self.patch_size)
        h = tokens.reshape(len(x), x.shape[1] // self.patch_size, x.shape[2] // self.patch_size, -1)
        h = self._conv(self.channels, **EXACT, name="conv_in")(h).astype(self.dtype)
        skips = self._down(h, block)
        h = self._middle(skips[-1], block)
        h = self._up(h, skips, block)
        h = nn.swish(GroupNorm(self.num_groups, self.norm_eps, name="norm_out")(h))
        h = self._conv(self.patch_size**2 * self.out_channels, kernel_init=near_zero, **EXACT, name="conv_out")(h)
        output = image_of(h.reshape(*tokens.shape[:2], -1), self.patch_size, *x.shape[1:3])
        return output.at[..., : x.shape[-1]].add(x) if self.add_input else output

    @nn.nowrap
    def _input(self, x: Array, network_t: Array) -> Array:
        """x with the further channels that the network is shown."""
        shown = fourier_features(x, self.fourier_features)
        if not self.wiener:
            return shown
        at_0, slope = self.gamma_line
        gamma = at_0 + slope * network_t.astype(jnp.float32)
        return jnp.concatenate([shown, wiener_v(x, gamma, *self.wiener)], axis=-1)

    @nn.nowrap
    def _down(self, h: Array, block: Callable[..., Array]) -> list[Array]:
        """Every map on the way down, which the way up reads again; the last one is the smallest."""
        skips = [h]
        for level, factor in enumerate(self.channel_mult):
            for i in range(self.num_res_blocks):
                h = block(h, self.channels * factor, f"down_{level}_block_{i}")
                h = self._attention(h, f"down_{level}_attention_{i}")
                skips.append(h)
            if level < len(self.channel_mult) - 1:
                # TensorFlow's SAME: an even map is padded at its bottom and right only.
                padding = ((0, 1), (0, 1))
                name = f"down_{level}_downsample"
                h = self._conv(h.shape[-1], strides=2, padding=padding, dtype=self.dtype, name=name)(h)
                skips.append(h)
        return skips

    @nn.nowrap
    def _middle(self, h: Array, block: Callable[..., Array]) -> Array:
        h = block(h, h.shape[-1], "mid_block_0")
        if self.mid_attention:
            h = Attention(self.num_groups, self.num_heads, self.dtype, self.norm_eps, name="mid_attention")(h)
        return block(h, h.shape[-1], "mid_block_1")

    @nn.nowrap
    def _up(self, h: Array, skips: list[Array], block: Callable[..., Array]) -> Array:
        for level, factor in reversed(list(enumerate(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(h, self.channels * factor, f"up_{level}_block_{i}")
                h = self._attention(h, f"up_{level}_attention_{i}")
            if level > 0:
                h = self._conv(h.shape[-1], dtype=self.dtype, name=f"up_{level}_upsample")(doubled(h))
        return h

    @nn.nowrap
    def _attention(self, h: Array, name: str) -> Array:
        """h after attention, at the resolutions that have it."""
        if h.shape[1] not in self.attention_resolutions:
            return h
        return Attention(self.num_groups, self.num_heads, self.dtype, self.norm_eps, name=name)(h)
