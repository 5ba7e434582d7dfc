"""The cost of input: choosing a batch, moving it to the device and scaling it to [-1, 1], beside PyTorch's DataLoader.

    python -m benchmarks.input
    python -m benchmarks.input --data=cifar10 --batch-size=128

All images of the split are on the device, so a step moves only its indices. The DataLoader collates the same images,
flips half of each batch and maps it to [-1, 1], in this process and in two workers. benchmarks.streaming measures
images that stay on disk.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import networks, sides, timing
from benchmarks.networks import torch
from benchmarks.timing import Arm, Arms
from diffusion import data
from diffusion.data import Source
from diffusion.data.levels import to_unit
from experiments.commands import exit_with

BATCHES = 100


def main() -> None:
    parser = sides.arguments(__doc__, "input")
    parser.add_argument("--data", default="digits", help="data.name")
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--batch-size", type=timing.count, default=128)
    args = parser.parse_args()
    costs, _ = sides.measured(args, our_arms, peer_arms if torch is not None else None)

    def columns(_: str, seconds: np.ndarray) -> dict[str, Any]:
        rate = timing.quartiles(args.batch_size * BATCHES / seconds)
        return {"milliseconds per batch": timing.quartiles(1e3 * seconds / BATCHES), "images/s": rate}

    timing.finish(args.out, vars(args), timing.rows(costs, columns))


def our_arms(args) -> Arms:
    source = data.load(args.data, "train", args.data_dir)
    return {
        "ours: choose indices": Arm(lambda: list(indices(args, source))),
        "ours: choose, move, gather, flip": Arm(our_batches(args, source)),
    }


def peer_arms(args) -> Arms:
    source = data.load(args.data, "train", args.data_dir)
    return {f"DataLoader, {workers} workers": Arm(peer_batches(args, source, workers)) for workers in (0, 2)}


def indices(args, source: Source) -> Iterator[np.ndarray]:
    for step in range(BATCHES):
        yield data.batch_indices(0, step, args.batch_size, len(source))


def our_batches(args, source: Source) -> Callable[[], None]:
    """The part of a train step before the network, as its own compiled call on one device."""

    @jax.jit
    def batch(images, indices):
        x0 = to_unit(images[indices], source.num_levels)
        mirrored = jax.random.bernoulli(jax.random.key(0), shape=(len(x0),))
        return jnp.where(mirrored[:, None, None, None], x0[:, :, ::-1], x0)

    on_device = jax.device_put(source.images())

    def run() -> None:
        for chosen in indices(args, source):
            x0 = batch(on_device, chosen)
        jax.block_until_ready(x0)

    return run


def peer_batches(args, source: Source, workers: int) -> Callable[[], None]:
    channels_first = source.images().transpose(0, 3, 1, 2).copy()
    dataset = torch.utils.data.TensorDataset(torch.tensor(channels_first))
    loader = torch.utils.data.DataLoader(
        dataset, args.batch_size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )

    def run() -> None:
        epochs = itertools.chain.from_iterable(itertools.repeat(loader))
        for (batch,) in itertools.islice(epochs, BATCHES):
            x0 = batch.to(networks.device()).float() / ((source.num_levels - 1) / 2) - 1
            x0 = torch.where(torch.rand(len(x0), 1, 1, 1, device=x0.device) < 0.5, x0.flip(3), x0)

    return networks.synchronized(run)


if __name__ == "__main__":
    exit_with(main)
