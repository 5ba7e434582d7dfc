"""Other ways to run our train step, which only a GPU can decide between: `benchmarks.train_step --arms` times them.

What wins moves into the library; what loses goes, and its row in README.md stays. `benchmarks.agreement` compares the
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
    """`layers.centre` from two sums that one pass over h gives, of the distances to the map's first pixel and of their
    squares.

    E[h²] − E[h]² would cancel where the mean is large; near a value of the map itself both terms are small.
    """
    # The result does not depend on it, so neither does its derivative.
    start = lax.stop_gradient(h[:, :1, :1])
    distance = h - start
    first, second = distance.mean(axis=(1, 2)), (distance**2).mean(axis=(1, 2))

    grouped = (len(h), num_groups, -1)
    means = (start[:, 0, 0] + first).reshape(grouped)
    variances = (second - first**2).reshape(grouped)
    mean = means.mean(axis=-1, keepdims=True)
    # The variance within the channels and that between them.
    variance = (variances + (means - mean) ** 2).mean(axis=-1)

    def of_channels(groups: Float[Array, "b groups"]) -> Float[Array, "b 1 1 c"]:
        return jnp.repeat(groups, h.shape[-1] // num_groups, axis=-1)[:, None, None, :]

    return h - of_channels(mean[..., 0]), of_channels(variance)


def attend_with_cudnn(
    query: Float[Array, "b q heads c"], key: Float[Array, "b k heads c"], value: Float[Array, "b k heads c"]
) -> Float[Array, "b q heads c"]:
    """`layers.attend` as cuDNN's fused kernel: bfloat16 alone, heads of at most 256 channels on Hopper, else 128."""
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


class Candidate(NamedTuple):
    """What differs from the library: fields of the U-Net, functions of `layers`, the steps of a call."""

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
    """Networks that are traced meanwhile have the candidate's layers."""
    with contextlib.ExitStack() as stack:
        for name, function in candidate.layers.items():
            stack.enter_context(mock.patch.object(layers, name, function))
        yield
