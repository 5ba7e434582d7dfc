"""A small image classifier. Its last hidden layer gives features for data that Inception was not made for."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from diffusion.networks.layers import Conv, Dense, GroupNorm

FEATURES = 128
WIDTHS = (32, 64, 128)  # of the maps; later ones have the last width
SMALLEST_MAP = 4


class Classifier(nn.Module):
    """3×3 convolutions, each followed by a max pool until the map has 4×4 pixels or fewer; then two dense layers."""

    num_classes: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b d"], Float[Array, "b classes"]]:
        """(FEATURES features, logits) of images in [-1, 1]."""
        stage = 0
        while True:
            x = Conv(WIDTHS[min(stage, len(WIDTHS) - 1)], name=f"conv_{stage}")(x)
            x = nn.relu(GroupNorm(8, name=f"norm_{stage}")(x))
            if min(x.shape[1:3]) <= SMALLEST_MAP:
                break
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
            stage += 1
        x = jnp.reshape(x, (len(x), -1))
        features = nn.relu(Dense(FEATURES, name="features")(x))
        return features, Dense(self.num_classes, name="logits")(features)
