"""An untrained run with known contents, in which only the EMA can be used."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion import data, reverse, schedules
from diffusion.experiment import build, workdir
from diffusion.model import Model
from diffusion.networks import NETWORKS
from diffusion.runtime.checkpoint import Checkpoints

NUM_STEPS = 3  # T


class ToyRun(NamedTuple):
    """Two checkpoints of a network of one layer, whose raw parameters are NaN: step 3 is the best, 6 the latest."""

    directory: Path
    config: Callable[..., ConfigDict]
    ema_params: dict[int, PyTree]

    def model(self, step: int) -> Model:
        """The model of a step's EMA, put together by hand."""

        def denoise(params, x_t, network_t):
            return toy.Layer(out_channels=2).apply({"params": params}, x_t, network_t)

        params = jax.tree.map(jnp.asarray, self.ema_params[step])
        p = reverse.make("v", "learned_range")
        return Model(jax.tree_util.Partial(denoise, params), p, schedules.cosine(NUM_STEPS), toy.LEVELS)


def config(**changes) -> ConfigDict:
    small = {
        "schedule__num_steps": NUM_STEPS, "eval__num_images": 5, "sample__num_images": 9, "train__num_steps": 6,
        "train__monitor_images": 2,
    }  # fmt: skip
    return toy.config(**small | changes)


@pytest.fixture
def untrained_demo(tiny, tmp_path):
    """A directory in which runs/digits is a network of one layer before its first step, for the demo's."""
    config, demo = tiny(), tmp_path / "runs" / "digits"
    workdir.claim(config, demo)
    start = jax.device_get(build.experiment(config, (8, 8, 1), 17).initial_state())
    with Checkpoints(demo / "checkpoints") as checkpoints:
        checkpoints.save(0, start, {"val_loss": 1.0})
    return tmp_path


@pytest.fixture
def toy_run(tmp_path, monkeypatch):
    monkeypatch.setitem(NETWORKS, "layer", toy.Layer)
    monkeypatch.setattr(data, "load", toy.load)
    monkeypatch.setattr(data, "describe", toy.describe)
    start = jax.device_get(build.experiment(config(), toy.SHAPE, toy.LEVELS).initial_state())
    rng, ema_params = np.random.default_rng(0), {}

    def drawn(leaf):
        return rng.normal(0, 0.2, leaf.shape).astype(np.float32)

    workdir.claim(config(), tmp_path)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step, val_loss in ((3, 1.0), (6, 2.0)):
            ema_params[step] = jax.tree.map(drawn, start.params)
            # So that some x̂_0 are clipped and others are not.
            ema_params[step]["pixel"]["kernel"] += np.float32([[-0.8, 0.0]])
            raw = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), start.params)
            state = start.replace(step=np.int32(step), params=raw, ema_params=ema_params[step])
            checkpoints.save(step, state, {"val_loss": val_loss})
    return ToyRun(tmp_path, config, ema_params)
