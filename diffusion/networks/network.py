"""A network as a function of parameters and a batch, with the number of output channels that are used."""

import dataclasses

from flax import linen as nn
from jaxtyping import Array, PyTree


@dataclasses.dataclass(frozen=True)
class Network:
    """(params, x_t [B, H, W, C], network_t [B]) -> the first `channels` of the output; equal if its fields are.

    A conditional network also takes labels [B].
    """

    module: nn.Module
    channels: int

    def __call__(self, params: PyTree, x_t: Array, network_t: Array, labels: Array | None = None) -> Array:
        given = {} if labels is None else {"labels": labels}
        # Flax ignores the parameters of a learned schedule, because they belong to no module of the network.
        return self.module.apply({"params": params}, x_t, network_t, **given)[..., : self.channels]
