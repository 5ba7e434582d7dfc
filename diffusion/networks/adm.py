"""The U-Net of Nichol & Dhariwal (2021) and of Dhariwal & Nichol (2021), who call theirs ADM.

It is Ho et al.'s network (`unet.py`) with these differences:

- the time embedding has the cosines before the sines, and other frequencies;
- downsampling pads all sides or, with `block_resampling`, residual blocks halve and double the map;
- attention heads are set by their number or their channels, and the number may differ on the way up;
- the widths may be fractions of `channels`; the time embedding has `channels` elements.

Source: openai/improved-diffusion and openai/guided-diffusion, unet.py and nn.py.
"""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key, Real

from diffusion.networks.layers import (
    CONVOLUTIONS,
    EXACT,
    Attention,
    GroupNorm,
    conditioning_vector,
    doubled,
    halved,
    near_zero,
)
from diffusion.networks.unet import MAX_BLOCKS, MAX_WIDTH, ResidualBlock


def time_embedding(network_t: Real[Array, " b"], width: int) -> Float[Array, "b {width}"]:
    """cos and then sin of network_t * 10000^(-k / (width/2)) for k = 0 ... width/2 - 1, in float32."""
    half = width // 2
    # In float32 from the start, as in the original code: at t = 1000 one bit of a frequency changes the sine.
    frequencies = np.exp(np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half))
    angles = network_t.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class ADM(nn.Module):
    """The network; the default fields are Nichol & Dhariwal's for ImageNet 64×64.

    adm.apply({"params": params}, x, network_t, dropout_keys=None, labels=None)

    Attributes:
      channels: the unit of `channel_mult`; the time embedding is made of `channels` cosines and sines.
      channel_mult: the width of each level, in units of `channels`; the map is halved between levels.
      num_res_blocks: residual blocks per level on the way down; there is one more per level on the way up.
      attention_resolutions: heights of the map at which every block is followed by attention. Between the two
        blocks in the middle there always is one.
      num_groups: groups of every group normalization.
      norm_eps: what every group normalization adds to the variance.
      num_heads: heads of every attention; they share the channels out between them.
      num_heads_up: the same on the way up; 0 for as many as on the way down.
      head_channels: channels of every head, whatever `num_heads` and `num_heads_up` say; 0 to follow those.
      dropout: probability with which an activation is dropped where dropout_keys are given.
      scale_shift_norm: the time embedding scales and shifts a block's second norm instead of being added before.
      block_resampling: residual blocks halve and double the map, not convolutions.
      num_classes: of the labels that the network is given, each with a learned vector that is added to the time
        embedding; 0 for a network that is given none.
      out_channels: channels of the output.
      convolution: what computes the 3×3 convolutions, as in `UNet`.
      dtype: what the maps and matrix products are computed in, as in `UNet`.
      remat: recompute the residual blocks in the backward pass instead of keeping their insides.
    """

    channels: int = 128
    channel_mult: tuple[float | int, ...] = (1, 2, 3, 4)
    num_res_blocks: int = 3
    attention_resolutions: tuple[int, ...] = (16, 8)
    num_groups: int = 32
    norm_eps: float = 1e-5
    num_heads: int = 4
    num_heads_up: int = 0
    head_channels: int = 0
    dropout: float = 0.0
    scale_shift_norm: bool = True
    block_resampling: bool = False
    num_classes: int = 0
    out_channels: int = 6
    convolution: Literal["xla", "winograd"] = "xla"
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [int(factor * self.channels) for factor in self.channel_mult]

    def heads(self, features: int, up: bool = False) -> int:
        """The number of heads of an attention on maps with this many features, on the way up or not."""
        if self.head_channels:
            return features // self.head_channels
        return self.num_heads_up if up and self.num_heads_up else self.num_heads

    def check(self, image_shape: tuple[int, ...]) -> None:
        """Raises a ValueError that names the config key if these fields do not fit images of [H, W, C]."""
        height, width, _ = image_shape
        self._check_ranges()
        halvings = 2 ** (len(self.channel_mult) - 1)
        if height % halvings or width % halvings:
            raise ValueError(
                f"adm.channel_mult={self.channel_mult} needs a height and a width that are multiples of {halvings}, "
                f"not {height}×{width}"
            )
        heights = [height >> level for level in range(len(self.channel_mult))]
        if not set(self.attention_resolutions) <= set(heights):
            raise ValueError(
                f"adm.attention_resolutions={self.attention_resolutions} may only name heights of the "
                f"{height}×{width} image's levels, {heights}"
            )
        if any(features % self.num_groups for features in self.widths):
            raise ValueError(f"adm.num_groups={self.num_groups} must divide the width of every level, {self.widths}")
        at = [level for level, h in enumerate(heights) if h in self.attention_resolutions]
        attended = sorted({self.widths[level] for level in [*at, -1]})
        names = ["head_channels"] if self.head_channels else ["num_heads", "num_heads_up"]
        for name in names:
            if (count := getattr(self, name)) and any(features % count for features in attended):
                raise ValueError(f"adm.{name}={count} must divide the width of every map with attention, {attended}")

    def _check_ranges(self) -> None:
        if not 4 <= self.channels <= MAX_WIDTH or self.channels % 2:
            raise ValueError(f"adm.channels={self.channels} must be even and in 4…{MAX_WIDTH}")
        if not self.channel_mult or not all(1 <= features <= MAX_WIDTH for features in self.widths):
            raise ValueError(f"adm.channel_mult={self.channel_mult} must make widths in 1…{MAX_WIDTH}, at least one")
        if not 1 <= self.num_res_blocks <= MAX_BLOCKS:
            raise ValueError(f"adm.num_res_blocks={self.num_res_blocks} must be in 1…{MAX_BLOCKS}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adm.dropout={self.dropout} must be in [0, 1)")
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"adm.norm_eps={self.norm_eps} must be in (0, 1)")
        lowest = {"num_groups": 1, "num_heads": 1, "num_heads_up": 0, "head_channels": 0}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"adm.{name}={getattr(self, name)} must be at least {low}")

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        network_t: Real[Array, " b"],
        dropout_keys: Key[Array, " b"] | None = None,
        labels: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b h w {self.out_channels}"]:
        """The network's output for noisy images x, conditioned on one number each (0 ... T - 1).

        Dropout needs a key for each example; without keys nothing is dropped. A network with classes needs a label for
        each example (-1 for none), except when it is initialized.
        """
        self.check(x.shape[1:])
        embedding = conditioning_vector(self, time_embedding(network_t, self.channels), labels)
        residual_block = nn.remat(ResidualBlock) if self.remat else ResidualBlock

        def block(h: Array, features: int, name: str, resample: Callable[[Array], Array] | None = None) -> Array:
            fields = (features, self.num_groups, self.dropout, self.scale_shift_norm)
            fields += (self.dtype, self.convolution, self.norm_eps, resample)
            return residual_block(*fields, name=name)(h, embedding, dropout_keys if self.dropout else None)

        conv = CONVOLUTIONS[self.convolution]
        h = conv(self.widths[0], **EXACT, name="conv_in")(x).astype(self.dtype)
        skips = self._down(h, block)
        h = block(skips[-1], self.widths[-1], "mid_block_0")
        h = self._attend(h, "mid_attention")
        h = block(h, self.widths[-1], "mid_block_1")
        h = self._up(h, skips, block)
        h = nn.swish(GroupNorm(self.num_groups, self.norm_eps, name="norm_out")(h))
        return conv(self.out_channels, kernel_init=near_zero, **EXACT, name="conv_out")(h)

    @nn.nowrap
    def _down(self, h: Array, block: Callable[..., Array]) -> list[Array]:
        """All maps on the way down, for the skip connections; the last one is the smallest."""
        skips = [h]
        for level, features in enumerate(self.widths):
            for i in range(self.num_res_blocks):
                h = block(h, features, f"down_{level}_block_{i}")
                if h.shape[1] in self.attention_resolutions:
                    h = self._attend(h, f"down_{level}_attention_{i}")
                skips.append(h)
            if level < len(self.widths) - 1:
                name = f"down_{level}_downsample"
                h = block(h, features, name, halved) if self.block_resampling else self._strided(h, name)
                skips.append(h)
        return skips

    @nn.nowrap
    def _strided(self, h: Array, name: str) -> Array:
        """h at half of its height and width, padded with zeros on all sides."""
        conv = CONVOLUTIONS[self.convolution]
        return conv(h.shape[-1], strides=2, padding=((1, 1), (1, 1)), dtype=self.dtype, name=name)(h)

    @nn.nowrap
    def _up(self, h: Array, skips: list[Array], block: Callable[..., Array]) -> Array:
        for level, features in reversed(list(enumerate(self.widths))):
            for i in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(h, features, f"up_{level}_block_{i}")
                if h.shape[1] in self.attention_resolutions:
                    h = self._attend(h, f"up_{level}_attention_{i}", up=True)
            if level > 0:
                name = f"up_{level}_upsample"
                if self.block_resampling:
                    h = block(h, features, name, doubled)
                else:
                    h = CONVOLUTIONS[self.convolution](features, dtype=self.dtype, name=name)(doubled(h))
        return h

    @nn.nowrap
    def _attend(self, h: Array, name: str, up: bool = False) -> Array:
        heads = self.heads(h.shape[-1], up)
        return Attention(self.num_groups, heads, self.dtype, self.norm_eps, name=name)(h)
