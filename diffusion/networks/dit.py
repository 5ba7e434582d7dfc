"""The transformer of Peebles & Xie (2023), DiT, with blocks of their kind "adaLN-Zero".

    x_t -- patches, each a token -- + position -- blocks -- norm, linear -- patches -- output
                  t (and label) -- embedding -- shift, scale and gate of every block

The map is never halved: every block works on one token for each patch. At the start every block is the identity, and
the output is exactly zero.

Source: facebookresearch/DiT, models.py.
"""

import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Int, Key, Real

from diffusion.networks.adm import time_embedding
from diffusion.networks.layers import EXACT, Dense, LabelEmbedding, attend, image_of, needed_labels, patches
from diffusion.networks.unet import MAX_BLOCKS, MAX_WIDTH

NORM_EPS = 1e-6
TIME_WIDTH = 256  # cosines and sines that the time embedding is made of
EMBEDDING_STD = 0.02  # of the weights that embed t and the label

zeros = nn.initializers.zeros
of_embeddings = nn.initializers.normal(EMBEDDING_STD)


def position_embedding(height: int, width: int, features: int) -> Float[np.ndarray, "{height*width} {features}"]:
    """sin and cos of the column, then sin and cos of the row, of each place of a map, row by row.

    A quarter of the features each, at the frequencies 10000^(-k / (features/4)). Vaswani et al. (2017), section 3.5,
    on each axis.
    """
    # The column is first in the original code too, where the variable is named after the height.
    rows, columns = np.divmod(np.arange(height * width), width)
    quarter = features // 4
    frequencies = 10000.0 ** (-np.arange(quarter) / quarter)
    angles = [place[:, None] * frequencies for place in (columns, rows)]
    waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return np.concatenate(waves, axis=1).astype(np.float32)


def modulated_norm(
    h: Float[Array, "b n c"], shift: Float[Array, "b c"], scale: Float[Array, "b c"]
) -> Float[Array, "b n c"]:
    """(1 + scale) * (h - mean) / sqrt(variance + eps) + shift, with each token's own statistics, in float32."""
    h = h.astype(jnp.float32)
    centred = h - h.mean(axis=-1, keepdims=True)
    normed = centred * lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + NORM_EPS)
    return normed * (1.0 + scale[:, None, :]) + shift[:, None, :]


class Block(nn.Module):
    """h + gate * attention(norm(h)), and then h + gate * mlp(norm(h)), the norms shifted and scaled (adaLN-Zero).

    All six vectors of shift, scale and gate come from the embedding; at the start they are zero.
    """

    num_heads: int
    mlp_width: int
    dtype: str

    @nn.compact
    def __call__(self, h: Float[Array, "b n c"], embedding: Float[Array, "b c"]) -> Float[Array, "b n c"]:
        features = h.shape[-1]
        modulation = Dense(6 * features, kernel_init=zeros, **EXACT, name="modulation")(nn.swish(embedding))
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(modulation, 6, axis=-1)

        # One matrix for all three: the original initialization takes its width from all their outputs.
        qkv = Dense(3 * features, dtype=self.dtype, name="qkv")(modulated_norm(h, shift_1, scale_1))
        query, key, value = jnp.split(qkv.reshape(*h.shape[:2], 3 * self.num_heads, -1), 3, axis=2)
        attended = attend(query, key, value).reshape(h.shape)
        h = self._gated(h, gate_1, Dense(features, dtype=self.dtype, name="projection")(attended))

        inner = Dense(self.mlp_width, dtype=self.dtype, name="mlp_1")(modulated_norm(h, shift_2, scale_2))
        return self._gated(h, gate_2, Dense(features, dtype=self.dtype, name="mlp_2")(nn.gelu(inner, approximate=True)))

    @nn.nowrap
    def _gated(self, h: Array, gate: Array, branch: Array) -> Array:
        return h + gate.astype(self.dtype)[:, None, :] * branch


class DiT(nn.Module):
    """The network; the default fields are DiT-S/2's, which has 33 million parameters.

    dit.apply({"params": params}, x, network_t, labels=None)

    Attributes:
      patch_size: height and width of the squares of pixels that are the tokens.
      hidden_size: width of every token.
      depth: blocks.
      num_heads: heads of every attention; they share the token out between them.
      mlp_ratio: width inside of every block's two-layer network, in units of `hidden_size`.
      num_classes: of the labels that the network is given, each with a learned vector that is added to the time
        embedding; 0 for a network that is given none.
      out_channels: channels of the output.
      dtype: what the tokens and matrix products are computed in. Parameters, norms, softmax, embeddings, modulation and
        the first and last layer are float32.
      remat: recompute the blocks in the backward pass instead of keeping their insides.
    """

    patch_size: int = 2
    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    num_classes: int = 0
    out_channels: int = 6
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False

    @property
    def mlp_width(self) -> int:
        """Width inside of every block's two-layer network."""
        return int(self.hidden_size * self.mlp_ratio)

    def check(self, image_shape: tuple[int, ...]) -> None:
        """Raises a ValueError that names the config key if these fields do not fit images of [H, W, C]."""
        height, width, _ = image_shape
        if self.patch_size < 1 or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"dit.patch_size={self.patch_size} must be at least 1 and divide height and width, {height}×{width}"
            )
        if not 4 <= self.hidden_size <= MAX_WIDTH or self.hidden_size % 4:
            raise ValueError(f"dit.hidden_size={self.hidden_size} must be a multiple of 4 in 4…{MAX_WIDTH}")
        if not 1 <= self.depth <= MAX_BLOCKS:
            raise ValueError(f"dit.depth={self.depth} must be in 1…{MAX_BLOCKS}")
        if self.num_heads < 1 or self.hidden_size % self.num_heads:
            raise ValueError(f"dit.num_heads={self.num_heads} must divide dit.hidden_size={self.hidden_size}")
        if not (math.isfinite(self.mlp_ratio) and 1 <= self.mlp_width <= MAX_WIDTH):
            raise ValueError(
                f"dit.mlp_ratio={self.mlp_ratio} must make a width in 1…{MAX_WIDTH} of "
                f"dit.hidden_size={self.hidden_size}"
            )

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        network_t: Real[Array, " b"],
        dropout_keys: Key[Array, " b"] | None = None,
        labels: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b h w {self.out_channels}"]:
        """The network's output for noisy images x and the number each is conditioned on (0 ... T - 1).

        It has no dropout, so it ignores dropout_keys. A network with classes needs a label for each example, -1 for
        none, but not to be initialized.
        """
        self.check(x.shape[1:])
        height, width = x.shape[1:3]
        embedding = self._embedding(network_t, labels)
        block = nn.remat(Block) if self.remat else Block

        # In float32, as the last layer: bfloat16 would blur the pixel values of an almost clean image.
        h = Dense(self.hidden_size, **EXACT, name="patches_in")(patches(x, self.patch_size))
        grid = height // self.patch_size, width // self.patch_size
        h = (h + position_embedding(*grid, self.hidden_size)[None]).astype(self.dtype)
        for i in range(self.depth):
            h = block(self.num_heads, self.mlp_width, self.dtype, name=f"block_{i}")(h, embedding)
        modulation = Dense(2 * self.hidden_size, kernel_init=zeros, **EXACT, name="modulation_out")
        shift, scale = jnp.split(modulation(nn.swish(embedding)), 2, axis=-1)
        last = Dense(self.patch_size**2 * self.out_channels, kernel_init=zeros, **EXACT, name="patches_out")
        return image_of(last(modulated_norm(h, shift, scale)), self.patch_size, height, width)

    @nn.nowrap
    def _embedding(self, network_t: Array, labels: Array | None) -> Array:
        """What every block is given: two layers of the time embedding, plus the vector of the label, if any."""
        embedding = time_embedding(network_t, TIME_WIDTH)
        embedding = Dense(self.hidden_size, kernel_init=of_embeddings, **EXACT, name="time_1")(embedding)
        embedding = Dense(self.hidden_size, kernel_init=of_embeddings, **EXACT, name="time_2")(nn.swish(embedding))
        if not self.num_classes:
            return embedding
        # In the original code no label has a learned vector, too. Here the bias of time_2 can hold it.
        of_labels = LabelEmbedding(self.num_classes, self.hidden_size, EMBEDDING_STD, name="label")
        return embedding + of_labels(needed_labels(self, labels, len(network_t)))
