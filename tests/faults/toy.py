"""A run whose every part is real but the network, which is one layer: it compiles in a second."""

import ast
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from configs import digits
from diffusion.data import ImageSet
from diffusion.experiment import build
from diffusion.experiment import workdir as workdir_lib
from diffusion.networks.unet import UNet
from diffusion.programs import train
from diffusion.runtime import processes
from diffusion.runtime.checkpoint import Checkpoints
from diffusion.runtime.preemption import Preemption


class Layer(UNet):
    """A convolution of 1×1 and what t adds to it; not a number wherever t is `poison`."""

    poison: float = -1.0

    @nn.compact
    def __call__(self, x, network_t, train=False):
        h = nn.Dense(2, name="pixel")(x)
        scale = nn.Dense(2, name="time")(network_t[:, None].astype(jnp.float32) / 50)
        poison = jnp.where(network_t == self.poison, jnp.nan, 1.0)
        return (h + scale[:, None, None, :]) * poison[:, None, None, None]


def config(**keys):
    """A config of the digits' run, small."""
    made = digits.get_config()
    small = {
        "train.batch_size": 16, "train.num_steps": 30, "train.log_every": 5, "train.checkpoint_every": 10,
        "train.sample_every": 0, "eval.num_images": 16, "optim.warmup_steps": 2, "train.check_replicas_every": 10,
    }  # fmt: skip
    with made.unlocked():
        made.update_from_flattened_dict(small | {key.replace("__", "."): value for key, value in keys.items()})
    return made


def experiment(poison: float = -1.0, **keys) -> build.Experiment:
    """The config's experiment with `Layer` for its network."""
    made = build.experiment(config(**keys), (8, 8, 1), 17)
    layer = Layer(**made.config.unet, out_channels=2, poison=poison)
    apply = lambda params, x_t, network_t, dropout_keys: layer.apply({"params": params}, x_t, network_t)  # noqa: E731
    return dataclasses.replace(made, unet=layer, training=dataclasses.replace(made.training, apply=apply))


def image_set(split: str) -> ImageSet:
    """Pictures from a generator of random numbers."""
    rng = np.random.default_rng(split == "test")
    return ImageSet("toy", split, rng.integers(0, 17, (64, 8, 8, 1), np.uint8), 17)


def run(experiment: build.Experiment, directory: Path):
    """Trains to the end, or on from where `directory` is; returns the last state."""
    sets = image_set("train"), image_set("test")
    with Preemption() as preemption, workdir_lib.owned(experiment.config, directory) as directory:
        with Checkpoints(directory / "checkpoints", keep=99) as checkpoints:
            state = train.resume(experiment, checkpoints)
            return train.train(experiment, directory, state, *sets, checkpoints, lambda params: None, preemption)


if __name__ == "__main__":
    # python tests/faults/toy.py WORKDIR [--coordinator=HOST:PORT --num_processes=N --process_id=I] [--KEY=VALUE ...]
    workdir, *flags = sys.argv[1:]
    given = dict(flag.lstrip("-").split("=", 1) for flag in flags)
    process = given.pop("coordinator", ""), *(int(given.pop(name, -1)) for name in ("num_processes", "process_id"))
    processes.join(*(None if value == -1 else value for value in process))
    run(experiment(**{key.replace(".", "__"): ast.literal_eval(value) for key, value in given.items()}), Path(workdir))
