"""A network and how many of its output's channels are used, as a function of parameters and a batch."""

import dataclasses

from flax import linen as nn
from jaxtyping import Array, PyTree


@dataclasses.dataclass(frozen=True)
class Network:
    """(params, x_t [B, H, W, C], network_t [B]) -> the first channels of the output; equal if its fields are.

    A conditional network takes labels [B], too.
    """

    module: nn.Module
    channels: int

    def __call__(self, params: PyTree, x_t: Array, network_t: Array, labels: Array | None = None) -> Array:
        given = {} if labels is None else {"labels": labels}
        # Flax passes over the parameters of a learned schedule, which are none of the network's modules.
        return self.module.apply({"params": params}, x_t, network_t, **given)[..., : self.channels]
