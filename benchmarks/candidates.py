"""Other ways to run our train step, to be decided on a GPU: `benchmarks.train_step --arms` times them.

A winner moves into the library. A loser is removed, and its row in README.md stays. `benchmarks.agreement` compares the
layers with the library's.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from diffusion.networks import layers


def centre_in_one_pass(
    h: Float[Array, "b h w c"], num_groups: int
) -> tuple[Float[Array, "b h w c"], Float[Array, "b 1 1 c"]]:
    """`layers.centre` in one pass over h, from the mean distance to the map's first pixel and the mean square of it.

    E[h²] − E[h]² would cancel if the mean is large. Relative to a value of the map itself, both terms are small.
    """
    # The result does not depend on this value, so its derivative is not needed.
    start = lax.stop_gradient(h[:, :1, :1])
    distance = h - start
    first, second = distance.mean(axis=(1, 2)), (distance**2).mean(axis=(1, 2))

    grouped = (len(h), num_groups, -1)
    means = (start[:, 0, 0] + first).reshape(grouped)
    variances = (second - first**2).reshape(grouped)
    mean = means.mean(axis=-1, keepdims=True)
    # The variance within the channels plus the variance between them.
    variance = (variances + (means - mean) ** 2).mean(axis=-1)

    def of_channels(groups: Float[Array, "b groups"]) -> Float[Array, "b 1 1 c"]:
        return jnp.repeat(groups, h.shape[-1] // num_groups, axis=-1)[:, None, None, :]

    return h - of_channels(mean[..., 0]), of_channels(variance)


def attend_with_cudnn(
    query: Float[Array, "b q heads c"], key: Float[Array, "b k heads c"], value: Float[Array, "b k heads c"]
) -> Float[Array, "b q heads c"]:
    """`layers.attend` as cuDNN's fused kernel: only bfloat16, heads of at most 256 channels on Hopper, else 128."""
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


class Candidate(NamedTuple):
    """The differences from the library: fields of the U-Net, functions of `layers`, the steps per call."""

    unet: dict[str, Any] = {}
    layers: dict[str, Callable] = {}
    steps_per_call: int | None = None


CANDIDATES = {
    "plain": Candidate(),
    "remat": Candidate(unet={"remat": True}),
    "one_pass_norm": Candidate(layers={"centre": centre_in_one_pass}),
    "cudnn_attention": Candidate(layers={"attend": attend_with_cudnn}),
    "single_steps": Candidate(steps_per_call=1),
}


@contextlib.contextmanager
def in_place(candidate: Candidate) -> Iterator[None]:
    """Networks that are traced in this context have the candidate's layers."""
    with contextlib.ExitStack() as stack:
        for name, function in candidate.layers.items():
            stack.enter_context(mock.patch.object(layers, name, function))
        yield
