"""A diffusion model: everything that evaluation, sampling and coding need, from any training code."""

import dataclasses
from typing import Any

import jax
import numpy as np

from diffusion import guidance
from diffusion.reverse import Reverse
from diffusion.schedules import Schedule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Model:
    """A network as a function, and the meaning of its output.

    A model is a pytree, so it can be an argument of a compiled function. Its arrays are the schedule's tables. If
    `denoise` is a `jax.tree_util.Partial(apply, params)`, they are also the network's parameters.

    Attributes:
        denoise: (x_t [B, H, W, C], network_t [B]) -> output [B, H, W, p.output_channels(C)].
        p: the reverse process: what the output predicts, and where the variance comes from.
        schedule: the forward process.
        num_levels: how many values a channel of a pixel can have: 256 for photographs.
        takes_labels: whether `denoise` takes labels [B] as a third argument. Samplers and bounds do not take such a
            network; bind its labels with `guidance` first.
    """

    denoise: Any  # a `reverse.Denoise`, or one with shapes instead of arrays
    p: Reverse = dataclasses.field(metadata={"static": True})
    schedule: Schedule
    num_levels: int = dataclasses.field(default=256, metadata={"static": True})
    takes_labels: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self):
        if callable(self.denoise) and not isinstance(self.denoise, jax.tree_util.Partial):
            object.__setattr__(self, "denoise", jax.tree_util.Partial(self.denoise))

    def __repr__(self) -> str:
        size = sum(np.size(leaf) for leaf in jax.tree.leaves(self.denoise))
        process = f"{self.p}, T = {self.schedule.num_steps}, {self.num_levels} levels"
        return f"Model({process}, {size:,} parameters{', takes labels' if self.takes_labels else ''})"

    def without_labels(self) -> "Model":
        """The model with a denoiser that takes no labels. Its network must be trained with label dropout."""
        return dataclasses.replace(self, denoise=guidance.unconditional(self.denoise), takes_labels=False)
