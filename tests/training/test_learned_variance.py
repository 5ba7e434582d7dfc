"""Learned variances stay finite in either precision, under every objective that trains them."""

from functools import partial

import jax
import numpy as np
import pytest

from configs import digits_fixed
from diffusion import data
from diffusion.experiment import build
from diffusion.training.step import train_step

NUM_STEPS = 2000
TIMESTEPS = {"vlb": "loss_aware", "hybrid": "uniform"}  # as Nichol & Dhariwal (2021) train them


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("objective", TIMESTEPS)
@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_learned_variance_trains_without_a_nan(variance, objective, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    config = digits_fixed.get_config()
    changes = {
        "model.variance": variance, "objective.name": objective, "objective.timesteps": TIMESTEPS[objective],
        "schedule.num_steps": 50, "unet.dtype": dtype, "unet.channels": 8, "unet.channel_mult": (1, 1),
        "unet.num_res_blocks": 1, "unet.num_groups": 4, "train.batch_size": 16, "train.num_steps": NUM_STEPS,
    }  # fmt: skip
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    images = data.load("digits", "train").images()
    experiment = build.experiment(config, images.shape[1:], num_levels=17)
    one = partial(train_step, experiment.training, axis_name="devices")
    step_fn = jax.jit(jax.vmap(one, axis_size=1, axis_name="devices", in_axes=(None, None, 0)))

    state, rows, seed = experiment.initial_state(), [], np.int32(config.seed)
    for step in range(NUM_STEPS):
        indices = data.batch_indices(config.seed, step, config.train.batch_size, len(images))
        batched, metrics = step_fn(seed, state, images[indices][None])
        state = jax.tree.map(lambda leaf: leaf[0], batched)
        rows.append({name: np.asarray(value[0]) for name, value in metrics.items()})  # some per example
        assert all(np.isfinite(value).all() for value in rows[-1].values()), f"step {step + 1}: {rows[-1]}"
    tenth = NUM_STEPS // 10
    first, last = (np.mean([row["vlb_bpd"] for row in part]) for part in (rows[:tenth], rows[-tenth:]))
    assert last < first
