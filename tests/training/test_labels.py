"""Labels in training: each image's own label reaches the network, on every path, and some are left out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from diffusion import schedules, timesteps
from diffusion.data import Source
from diffusion.guidance import NO_LABEL
from diffusion.runtime import devices
from diffusion.training import loop, optimizer, parallel
from diffusion.training import schedule as trained_schedule
from diffusion.training.step import Training, initial_state

BATCH, SHAPE, NUM_IMAGES = 16, (4, 4, 1), 40
RNG = np.random.default_rng(0)
LABELS = RNG.permutation(NUM_IMAGES).astype(np.int32)
# Every pixel of an image is its label, so that a loss sees whether the two came together.
PIXELS = np.broadcast_to(LABELS[:, None, None, None], (NUM_IMAGES, *SHAPE)).astype(np.uint8)
SOURCE = Source("numbers", "train", PIXELS, 41, LABELS, NUM_IMAGES)


class Label(nn.Module):
    """The label everywhere, times a number that is learned."""

    @nn.compact
    def __call__(self, x, network_t, dropout_keys=None, labels=None):
        number = self.param("number", nn.initializers.ones, ())
        labels = jnp.zeros(len(x)) if labels is None else labels
        return number * jnp.broadcast_to(labels.astype(jnp.float32)[:, None, None, None], x.shape)


def what_the_network_was_given(row, x0, x_t, eps, output):
    label, shown = jnp.mean(output), jnp.mean(x0 + 1) * 20  # pixel value 20 (x0 + 1)
    is_known = jnp.where(label == NO_LABEL, 0.0, 1.0)
    return is_known * (label - shown) ** 2, {"unknown": 1 - is_known}


def training(**changes):
    def schedule_of(params):
        return schedules.cosine(5)

    fields = {
        "network": Label(), "objective": what_the_network_was_given, "timesteps": timesteps.uniform(),
        "schedule": trained_schedule.make(schedule_of), "ema_decay": 0.9, "num_levels": 41,
        "optimizer": optimizer.make(optimizer.adam, optimizer.constant, 1e-9, num_steps=100),
        "batch_size": BATCH, "flip": False, "log_every": 3, "conditional": True,
    }  # fmt: skip
    return Training(**fields | changes)


def metrics_of(made, place, num_steps=3):
    params = {"number": jnp.ones(())}
    state = devices.replicate(jax.device_get(initial_state(made, params, SHAPE)))
    steps = parallel.train_steps(made, seed=0)
    indices = np.stack([np.arange(BATCH, dtype=np.int32)[::-1] + step for step in range(num_steps)])
    _, metrics = steps(state, place(SOURCE, made.conditional)(indices))
    return metrics.host()


@pytest.mark.parametrize("place", [parallel.resident, parallel.streamed])
@pytest.mark.parametrize("grad_accum", [1, 2])
def test_every_image_comes_with_its_own_label(place, grad_accum):
    metrics = metrics_of(training(grad_accum=grad_accum), place)
    np.testing.assert_allclose(metrics["losses"], 0.0, atol=1e-8)  # (label − pixel)² in float32, below 40²
    np.testing.assert_array_equal(metrics["unknown"], 0.0)


def test_labels_of_other_images_would_be_seen():
    wrong = dataclasses.replace(SOURCE, classes=np.roll(LABELS, 1))
    assert (parallel.resident(wrong, True)(np.zeros((1, BATCH), np.int32)).labels[0] != LABELS).any()


def test_label_dropout_leaves_out_that_part_of_the_labels_in_every_step_anew():
    metrics = metrics_of(training(label_dropout=0.25), parallel.resident, num_steps=100)
    unknown = metrics["unknown"]
    # 1,600 labels: the standard error of the rate is √(0.25 · 0.75 / 1600) = 0.011.
    assert abs(unknown.mean() - 0.25) < 4 * 0.011
    assert unknown.std() > 0.05
    np.testing.assert_allclose(metrics["losses"], 0.0, atol=1e-8)


def test_both_paths_leave_out_the_same_labels():
    made = training(label_dropout=0.5)
    one, other = metrics_of(made, parallel.resident, 5), metrics_of(made, parallel.streamed, 5)
    np.testing.assert_array_equal(one["unknown"], other["unknown"])


def test_the_monitored_loss_knows_every_label():
    made = training(label_dropout=0.5)
    monitor = loop.monitor(made, 0, 5, SOURCE, np.arange(7, 31))
    assert monitor(devices.replicate({"number": np.ones((), np.float32)}))["val_loss"] < 1e-8
    assert monitor(devices.replicate({"number": np.full((), 2, np.float32)}))["val_loss"] > 1


def test_a_network_without_labels_gets_none():
    batch = parallel.resident(SOURCE)(np.zeros((1, BATCH), np.int32))
    assert batch.labels is None
