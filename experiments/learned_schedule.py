"""A learned noise schedule against the fixed one it starts from: the bound, and the variance of the training loss.

    python -m experiments.learned_schedule --workdir=runs/learned_schedule [--num_steps=20,50] [--seeds=0,1,2]

For each T and each seed it trains three small networks on the digits, for equally many steps of equally many images:
with the cosine schedule as it is, with a schedule that starts there and is trained by the bound, and with one whose
inner part is trained to minimise the variance of the loss. Leaves learned_schedule.json, .md and .png in the working
directory.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from configs import digits
from diffusion import build, data, parallel, report
from diffusion.bound import bound_of
from diffusion.build import Experiment
from diffusion.data import ImageSet
from diffusion.state import TrainState
from diffusion.step import train_step

FILE = "learned_schedule"
START = "cosine"
ARMS = {
    "fixed": {"schedule.name": START},
    "learned, by the bound": {"schedule.name": "learned", "schedule.start": START, "schedule.inner": "bound"},
    "learned, by the variance": {"schedule.name": "learned", "schedule.start": START, "schedule.inner": "variance"},
}


def arm_config(arm: str, num_steps: int, train_steps: int) -> ConfigDict:
    """The digits' config with a narrower network, and the arm's schedule."""
    config = digits.get_config()
    small = {"unet.channels": 16, "train.num_steps": train_steps, "schedule.num_steps": num_steps}
    with config.unlocked():
        config.update_from_flattened_dict(small | ARMS[arm])
    return config


def trainer(experiment: Experiment, train_set: ImageSet):
    """seed -> the state after training. The seed is an argument of the compiled step, which serves all of them."""
    config = experiment.config

    def one_step(seed, state, images, indices):
        training = dataclasses.replace(experiment.training, seed=seed)
        return train_step(training, state, images, indices, parallel.AXIS)

    compiled, images = parallel.over_devices(one_step), parallel.replicate(train_set.images)

    def train(seed: int) -> TrainState:
        seeded = ConfigDict(config.to_dict() | {"seed": seed})
        state = parallel.replicate(jax.device_get(dataclasses.replace(experiment, config=seeded).initial_state()))
        seeds = parallel.replicate(np.asarray(seed, np.int32))
        with report.Progress(config.train.num_steps, desc=f"{config.schedule.name}, seed {seed}") as progress:
            for step in range(config.train.num_steps):
                indices = data.batch_indices(seed, step, config.train.batch_size, len(train_set.images))
                state, metrics = compiled(seeds, state, images, parallel.shard_steps(indices[None])[:, 0])
                progress.update(1)
                if not np.isfinite(parallel.unreplicate(metrics)["loss"]):
                    raise FloatingPointError(f"the loss of seed {seed} at step {step + 1} is not finite")
        return parallel.unreplicate(state)

    return train
