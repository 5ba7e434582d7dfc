"""A model and a data set with cheap terms of every size."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from diffusion import reverse, schedules
from diffusion.data import Source
from diffusion.model import Model

NUM_STEPS, NUM_LEVELS = 6, 17


@pytest.fixture(scope="session")
def source():
    """30 images of 4 × 4 pixels."""
    pixels = np.random.default_rng(0).integers(0, NUM_LEVELS, (30, 4, 4, 1), np.uint8)
    return Source("noise", "test", pixels, NUM_LEVELS)


@pytest.fixture(scope="session")
def model():
    """A network that is no good, with a learned variance."""

    def denoise(params, x_t, network_t):
        raw = jnp.tanh(x_t + network_t[:, None, None, None])
        return jnp.concatenate([params["scale"] * x_t, raw], axis=-1)

    p = reverse.make("eps", "learned_range")
    return Model(Partial(denoise, {"scale": jnp.float32(0.7)}), p, schedules.cosine(NUM_STEPS), NUM_LEVELS)
