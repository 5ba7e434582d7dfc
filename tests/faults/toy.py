"""A run with a network of one layer, which compiles in a second; all other parts are real.

    python tests/faults/toy.py WORKDIR [--coordinator=HOST:PORT --num_processes=N --process_id=I] [--KEY=VALUE ...]
"""

import ast
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import digits_fixed
from diffusion.data import Description, Source
from diffusion.data.source import Splits
from diffusion.experiment import build, workdir
from diffusion.guidance import NO_LABEL
from diffusion.networks import NETWORKS
from diffusion.networks.dropout import dropout
from diffusion.networks.layers import LabelEmbedding
from diffusion.programs import sample, train
from diffusion.runtime import processes
from diffusion.runtime.preemption import Preemption
from diffusion.training import parallel
from diffusion.training.step import TrainState

SHAPE, LEVELS = (8, 8, 1), 17


class Layer(nn.Module):
    """A convolution of 1×1 and what t adds to it; NaN wherever network_t is `poison`."""

    poison: float = -1.0
    out_channels: int = 2

    def check(self, image_shape: tuple[int, ...]) -> None:
        """It fits images of any shape."""

    @nn.compact
    def __call__(self, x, network_t, dropout_keys=None):
        h = nn.Dense(self.out_channels, name="pixel")(x)
        scale = nn.Dense(self.out_channels, name="time")(network_t[:, None].astype(jnp.float32) / 50)
        poison = jnp.where(network_t == self.poison, jnp.nan, 1.0)
        return (h + scale[:, None, None, :]) * poison[:, None, None, None]


class Labelled(nn.Module):
    """That layer with a vector for each label, which is added, and with dropout."""

    num_classes: int = 0
    dropout: float = 0.1
    out_channels: int = 2

    def check(self, image_shape: tuple[int, ...]) -> None:
        """It fits images of any shape."""

    @nn.compact
    def __call__(self, x, network_t, dropout_keys=None, labels=None):
        h = Layer(out_channels=self.out_channels, name="layer")(x, network_t)
        if self.num_classes:
            labels = jnp.full(len(x), NO_LABEL) if labels is None else labels
            h = h + LabelEmbedding(self.num_classes, self.out_channels, name="label")(labels)[:, None, None, :]
        return h if dropout_keys is None else dropout(h, self.dropout, dropout_keys)


def register() -> None:
    """Makes model.network="layer" and "labelled" choices."""
    NETWORKS.update(layer=Layer, labelled=Labelled)


def config(**keys):
    """A config of the digits' run, small."""
    made = digits_fixed.get_config()
    small = {
        "model.network": "layer", "train.batch_size": 16, "train.num_steps": 30, "train.log_every": 5,
        "train.checkpoint_every": 10, "train.keep_checkpoints": 99, "train.sample_every": 0,
        "train.check_replicas_every": 10, "data.validation": 0, "eval.num_images": 16, "optim.warmup_steps": 2,
    }  # fmt: skip
    with made.unlocked():
        made.update_from_flattened_dict(small | {key.replace("__", "."): value for key, value in keys.items()})
    return made


def experiment(**keys) -> build.Experiment:
    """What `config` describes, for images of noise."""
    return build.experiment(config(**keys), SHAPE, LEVELS)


def source(split: str) -> Source:
    """Pictures from a generator of random numbers."""
    rng = np.random.default_rng(["train", "test", "validation"].index(split))
    return Source("toy", split, rng.integers(0, LEVELS, (64, *SHAPE), np.uint8), LEVELS)


def load(name: str, split: str, *_) -> Source:
    """In the place of data.load."""
    return source(split)


def describe(*_) -> Description:
    """In the place of data.describe."""
    return Description("toy", 64, 64, SHAPE, LEVELS, 0)


def run(experiment: build.Experiment, directory: Path) -> TrainState:
    """Trains to the end, or on from where `directory` is; returns the last state."""
    draw = sample.make_sampler(experiment)
    with Preemption() as preemption, workdir.owned(experiment.config, directory) as directory:
        splits = Splits(*(source(split) for split in Splits._fields))
        return train.train(experiment, directory, splits, draw, preemption)


def interrupt(monkeypatch: pytest.MonkeyPatch, steps: Iterable[int], action: Callable[[], None]) -> None:
    """`action()` just before one of `steps`, counted from 0, is taken; each step is interrupted once."""
    train_steps, remaining = parallel.train_steps, set(steps)

    def interrupted(training, seed):
        compiled = train_steps(training, seed)

        def call(state, batch):
            begin = int(state.part(lambda state: state.step).host())
            if now := remaining & set(range(begin, begin + batch.indices.shape[1])):
                remaining.difference_update(now)
                action()
            return compiled(state, batch)

        return call

    monkeypatch.setattr(parallel, "train_steps", interrupted)


def main(directory: Path, flags: list[str]) -> None:
    given = dict(flag.lstrip("-").split("=", 1) for flag in flags)
    coordinator = given.pop("coordinator", "")
    numbers = [int(given.pop(name)) if name in given else None for name in ("num_processes", "process_id")]
    processes.join(coordinator, *numbers)
    register()
    run(experiment(**{key.replace(".", "__"): ast.literal_eval(value) for key, value in given.items()}), directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
