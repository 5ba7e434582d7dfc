"""The bound: (image, t) terms per second, and the resulting time for 10,000 images × 1,000 terms.

    python -m benchmarks.likelihood                                                 # on a GPU
    python -m benchmarks.likelihood --size=small --batch-sizes 8 32 --batches=2     # the same on a CPU

One program scores batches of (image, t), each pair with its own t. The peer is only the PyTorch network, with
channels_last. A PyTorch program for the same bound could at best be as fast, since it must also compute the terms.
"""

from functools import partial
from typing import Any

import jax
import numpy as np

from benchmarks import networks, sides, timing
from benchmarks.networks import torch
from benchmarks.timing import Arm, Arms
from diffusion.data import Source
from diffusion.evaluation import bound
from diffusion.experiment import build
from diffusion.runtime import devices
from experiments.commands import exit_with

PAIRS = 10_000 * 1_000


def main() -> None:
    parser = sides.arguments(__doc__, "likelihood")
    on_cpu = jax.default_backend() == "cpu"
    parser.add_argument("--size", choices=networks.SIZES, default="full")
    parser.add_argument("--batch-sizes", type=timing.count, nargs="+", default=[8] if on_cpu else [256, 1024, 4096])
    parser.add_argument("--batches", type=timing.count, default=2 if on_cpu else 10, help="batches in a timed call")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    costs, known = sides.measured(args, our_arms, peer_arms if networks.has_peer(networks.diffusers) else None)

    def columns(name: str, seconds: np.ndarray) -> dict[str, Any]:
        rate = known[name]["pairs"] / seconds
        hours = timing.quartiles(PAIRS / rate / 3600)
        return {"terms/s": timing.quartiles(rate), "10,000 × 1,000 terms, hours": hours}

    timing.finish(args.out, vars(args), timing.rows(costs, columns))


def our_arms(args) -> Arms:
    params = networks.peer(args.size)[0] if networks.has_peer(networks.diffusers) else None
    return {f"ours, {size} pairs": our_arm(args, size, params) for size in args.batch_sizes}


def peer_arms(args) -> Arms:
    module = networks.peer(args.size)[1]
    return {f"PyTorch, forward alone, {size}": peer_arm(args, size, module) for size in args.batch_sizes}


def our_arm(args, batch_size: int, params) -> Arm:
    """The bound of `batch_size` images on a schedule of `args.batches` steps, which makes `args.batches` batches."""
    config = networks.config_of(args.size, dtype=args.dtype)
    config.schedule.name, config.schedule.num_steps, config.eval.batch_size = "cosine", args.batches, batch_size
    config.eval.terms_per_image = 0  # every term
    experiment = build.experiment(config, networks.IMAGE_SHAPE, 256)
    params = experiment.initial_state().params if params is None else params
    model, score = devices.replicate(experiment.model(params)), bound.full_bound(build.bound_settings(config))
    images = np.random.default_rng(0).integers(0, 256, (batch_size, *networks.IMAGE_SHAPE), np.uint8)
    source = Source("random", "test", images)
    return Arm(partial(score, model, source, np.arange(batch_size)), {"pairs": batch_size * args.batches})


def peer_arm(args, batch_size: int, module) -> Arm:
    module = module.eval().to(memory_format=torch.channels_last)
    x = torch.randn(batch_size, 3, 32, 32, device=networks.device()).to(memory_format=torch.channels_last)
    t = torch.arange(batch_size, device=networks.device())

    def forward() -> None:
        with torch.no_grad(), torch.autocast(networks.device(), torch.bfloat16, enabled=args.dtype == "bfloat16"):
            for _ in range(args.batches):
                module(x, t)

    return Arm(networks.synchronized(forward), {"pairs": batch_size * args.batches})


if __name__ == "__main__":
    exit_with(main)
