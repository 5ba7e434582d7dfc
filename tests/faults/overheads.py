"""The cost of checks: digests, replica checks and saves of the CIFAR-10 run's state, relative to one of its steps.

    python tests/faults/overheads.py [--batch_size=128] [--step_seconds=S]

Prints seconds and shares. The step is measured at --batch_size on the available devices, or given. It takes minutes on
an accelerator. On CPUs take --batch_size=8: a smaller step makes every share larger than it is.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import numpy as np

from configs import cifar10
from diffusion.data import Source
from diffusion.experiment import build
from diffusion.runtime import devices
from diffusion.runtime.checkpoint import Checkpoints
from diffusion.runtime.digests import leaf_sha256
from diffusion.training import parallel


def seconds(action, times: int = 3) -> float:
    """The median time of `action`, once it is compiled."""
    action()
    taken = []
    for _ in range(times):
        started = time.monotonic()
        action()
        taken.append(time.monotonic() - started)
    return statistics.median(taken)


def step_seconds(experiment: build.Experiment, state: devices.Replicated) -> float:
    """One train step on random pictures."""
    batch_size = experiment.training.batch_size
    images = np.random.default_rng(0).integers(0, 256, (batch_size, *experiment.image_shape), np.uint8)
    batch = parallel.resident(Source("random", "train", images))(np.arange(batch_size, dtype=np.int32)[None])
    train_steps = parallel.train_steps(experiment.training, experiment.config.seed)
    held = [state]

    def take():
        held[0], metrics = train_steps(held[0], batch)
        metrics.wait()

    return seconds(take)


def main(batch_size: int, step: float | None) -> None:
    config = cifar10.get_config()
    config.train.batch_size = batch_size
    experiment = build.experiment(config, (32, 32, 3), 256)
    state = jax.device_get(experiment.initial_state())
    replicated, differing = devices.replicate(state), parallel.differing_replicas()
    megabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6
    digests, replicas = seconds(lambda: leaf_sha256(state)), seconds(lambda: differing(replicated))
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, keep=1) as checkpoints:
        stalls = []
        for number in (1, 2, 3):
            started = time.monotonic()
            checkpoints.save(number, replicated.host(), {})
            stalls.append(time.monotonic() - started)
            checkpoints.wait()
    step = step_seconds(experiment, replicated) if step is None else step
    every, compared = config.train.checkpoint_every, config.train.check_replicas_every
    print(f"{jax.device_count()} × {jax.devices()[0].device_kind}, state of {megabytes:.0f} MB")
    print(f"step of {batch_size} images           {step:.3f} s")
    print(f"digests, each save            {digests:.3f} s: {digests / every / step:.4%} of every step")
    print(f"replica check                 {replicas:.3f} s: {replicas / compared / step:.4%} of every step")
    print(
        f"stall of a save               {statistics.median(stalls):.3f} s: {statistics.median(stalls) / step:.2f} steps"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--step_seconds", type=float)
    arguments = parser.parse_args()
    main(arguments.batch_size, arguments.step_seconds)
