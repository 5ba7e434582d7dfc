"""The parts of the train step: moving average, warm-up, window, dropout and flips, with a network of one number."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from diffusion import post_hoc_ema, schedules, timesteps
from diffusion.data import Source
from diffusion.runtime import devices
from diffusion.training import loop, optimizer
from diffusion.training import schedule as trained_schedule
from diffusion.training.step import Training, initial_state, train_step

NUM_STEPS, BATCH, LEVELS, SHAPE = 5, 16, 17, (4, 6, 1)
LEARNING_RATE, EMA_DECAY = 0.1, 0.9
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, LEVELS, (BATCH, *SHAPE), np.uint8)
WEIGHTS = RNG.normal(size=SHAPE).astype(np.float32)  # of a sum that tells an image from its reflections


class Number(nn.Module):
    """The same number everywhere, whatever the input; where dropout is active, plus one drawn from the image's key."""

    @nn.compact
    def __call__(self, x, network_t, dropout_keys=None):
        number = self.param("number", nn.initializers.ones, ())
        if dropout_keys is None:
            return jnp.full_like(x, number)
        drawn = jax.vmap(jax.random.uniform)(dropout_keys)
        return jnp.full_like(x, number) + drawn[:, None, None, None]


def mean_output(row, x0, x_t, eps, output):
    """The gradient of the number is 1, so each of Adam's steps is as long as the learning rate."""
    return jnp.mean(output), {"double": 2 * jnp.mean(output)}


def weighted_pixels(row, x0, x_t, eps, output):
    return jnp.sum(WEIGHTS * x0), {}


def adam(**settings):
    return optimizer.make(optimizer.adam, optimizer.constant, LEARNING_RATE, num_steps=100, **settings)


def training(**changes):
    """What a step needs, at its smallest."""

    def schedule_of(params):
        return schedules.cosine(NUM_STEPS)

    fields = {
        "network": Number(), "objective": mean_output, "timesteps": timesteps.uniform(),
        "schedule": trained_schedule.make(schedule_of), "optimizer": adam(), "ema_decay": EMA_DECAY,
        "num_levels": LEVELS, "batch_size": BATCH, "flip": False, "log_every": 3,
    }  # fmt: skip
    return Training(**fields | changes)


def take(made, num_steps, seed=0, num_devices=1):
    """The state at the start and after each step on the same batch, and each step's metrics.

    The devices are an axis of vmap; all must come to the same state and metrics.
    """
    one = partial(train_step, made, axis_name="devices")
    step = jax.jit(jax.vmap(one, axis_name="devices", in_axes=(None, None, 0)))
    params = made.network.init(jax.random.key(0), jnp.zeros((1, *SHAPE)), jnp.zeros(1))["params"]
    states, all_metrics = [initial_state(made, params, SHAPE)], []
    for _ in range(num_steps):
        stepped = step(np.int32(seed), states[-1], IMAGES.reshape(num_devices, -1, *SHAPE))
        for leaf in jax.tree.leaves(stepped):
            np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
        state, metrics = jax.tree.map(lambda leaf: np.asarray(leaf[0]), stepped)
        states.append(state)
        all_metrics.append(metrics)
    return states, all_metrics


@pytest.fixture(scope="module")
def seven_steps():
    return take(training(), 7)


def numbers_of(states, name):
    return np.array([getattr(state, name)["number"] for state in states], np.float64)


def test_the_moving_average_starts_as_a_copy_and_follows_its_formula(seven_steps):
    states, _ = seven_steps
    taken = np.arange(8)
    np.testing.assert_allclose(numbers_of(states, "params"), 1 - LEARNING_RATE * taken, rtol=1e-4)
    # Of the line 1 − r n the average with decay d is behind by r (1 − dⁿ) d/(1 − d).
    behind = LEARNING_RATE * (1 - EMA_DECAY**taken) * EMA_DECAY / (1 - EMA_DECAY)
    np.testing.assert_allclose(numbers_of(states, "ema_params"), 1 - LEARNING_RATE * taken + behind, rtol=1e-4)
    assert [int(state.step) for state in states] == taken.tolist()


def test_averages_of_two_lengths_are_tracked_if_asked_for(seven_steps):
    """Karras et al. (2023), eq. 4: the weight of step i is what i^γ has between i − 1 and i."""
    states, _ = take(training(power_ema=(0.05, 0.2)), 4)
    params = numbers_of(states, "params")[1:]
    for average, length in zip(states[-1].power_ema, (0.05, 0.2), strict=True):
        share = np.diff((np.arange(5) / 4) ** (post_hoc_ema.exponent(length) + 1))
        np.testing.assert_allclose(average["number"], share @ params, rtol=1e-5)
    plain, _ = seven_steps
    assert plain[-1].power_ema == ()  # else not, and the step is the same
    np.testing.assert_array_equal(numbers_of(plain[:5], "ema_params"), numbers_of(states, "ema_params"))


def test_the_learning_rate_warms_up_from_0():
    states, _ = take(training(optimizer=adam(warmup_steps=4)), 6)
    moved = np.diff(numbers_of(states, "params"))
    np.testing.assert_allclose(moved, -LEARNING_RATE * np.array([0, 0.25, 0.5, 0.75, 1, 1]), rtol=1e-4)


def test_the_window_sums_the_metrics_since_the_last_row(seven_steps):
    states, metrics = seven_steps
    assert set(states[0].window) == {"loss", "double", "grad_norm", "count"}
    assert all(total == 0 for total in states[0].window.values())
    for name in ("loss", "double", "grad_norm"):
        of_step = np.array([row[name] for row in metrics], np.float64)
        for taken in range(1, 8):
            since = (taken - 1) // 3 * 3  # the steps before that are in earlier rows
            np.testing.assert_allclose(states[taken].window[name], of_step[since:taken].sum(), rtol=1e-5)
            assert states[taken].window["count"] == taken - since
    assert len({float(row["loss"]) for row in metrics}) == 7


def test_dropout_is_active_in_training_and_of_its_own_for_every_image_and_step(seven_steps):
    states, metrics = seven_steps
    before = numbers_of(states, "params")[:-1, None]
    drawn = np.array([row["losses"] for row in metrics]) - before
    assert drawn.shape == (7, BATCH) and (drawn > -1e-6).all() and (drawn < 1).all()
    assert len(np.unique(drawn.round(6))) == drawn.size


def test_dropout_is_not_active_in_the_monitored_loss():
    images, params = Source("noise", "validation", IMAGES, LEVELS), {"number": np.float32(0.75)}
    monitor = loop.monitor(training(), 0, NUM_STEPS, images, np.arange(BATCH))
    assert monitor(devices.replicate(params)) == {"val_loss": 0.75, "validation_images": len(IMAGES)}


def test_the_monitored_loss_has_the_decoder_s_share_even_of_fewer_images_than_steps():
    """A loss of T at t = 1 and of 0 elsewhere has the mean 1."""
    images, params = Source("noise", "validation", IMAGES, LEVELS), {"number": np.float32(0)}
    made = training(
        objective=lambda row, x0, x_t, eps, output: (jnp.where(row.t == 1, 1000.0, 0.0), {}),
        schedule=trained_schedule.make(lambda params: schedules.cosine(1000)),
    )
    found = [loop.monitor(made, 0, 1000, images, np.arange(BATCH), share) for share in (True, False)]
    assert [one(devices.replicate(params))["val_loss"] for one in found] == [pytest.approx(1, rel=1e-6), 0]


def test_half_of_the_images_are_mirrored_from_left_to_right_each_by_a_draw_of_its_own():
    _, metrics = take(training(objective=weighted_pixels, flip=True), 20)
    found = np.array([row["losses"] for row in metrics])
    x0 = 2 * IMAGES.astype(np.float64) / (LEVELS - 1) - 1

    def of(images):
        return np.sum(WEIGHTS * images, axis=(1, 2, 3))

    as_it_is, mirrored, upside_down, turned = of(x0), of(x0[:, :, ::-1]), of(x0[:, ::-1]), of(x0[:, ::-1, ::-1])
    for other in (mirrored, upside_down, turned):
        assert np.abs(as_it_is - other).min() > 1e-3
    is_mirrored = np.isclose(found, mirrored, atol=1e-4)
    np.testing.assert_allclose(found, np.where(is_mirrored, mirrored, as_it_is), atol=1e-4)
    assert abs(is_mirrored.mean() - 0.5) < 4 * 0.5 / is_mirrored.size**0.5
    # Neither is a batch mirrored as a whole, nor one image always or never.
    for axis in (0, 1):
        assert (is_mirrored.any(axis=axis) & ~is_mirrored.all(axis=axis)).all()


def test_without_flips_no_image_is_mirrored():
    _, metrics = take(training(objective=weighted_pixels), 2)
    x0 = 2 * IMAGES.astype(np.float64) / (LEVELS - 1) - 1
    for row in metrics:
        np.testing.assert_allclose(row["losses"], np.sum(WEIGHTS * x0, axis=(1, 2, 3)), atol=1e-4)


def all_that_is_random(row, x0, x_t, eps, output):
    """A loss in which t, the noise, the flips and dropout take part."""
    return jnp.mean((WEIGHTS * x_t - output) ** 2) + 0.1 * row.network_t, {}


RANDOM = training(objective=all_that_is_random, flip=True, timesteps=timesteps.loss_aware(history_length=1))


@pytest.fixture(scope="module")
def on_one_device():
    return take(RANDOM, 3)


@pytest.mark.parametrize("grad_accum", [1, 2])
def test_many_devices_take_the_steps_of_one_and_stay_equal(on_one_device, grad_accum):
    """The gradient is the mean over all devices, and every random number belongs to a position in the global batch."""
    on_eight = take(dataclasses.replace(RANDOM, grad_accum=grad_accum), 3, num_devices=8)
    for ours, theirs in zip(jax.tree.leaves(on_eight), jax.tree.leaves(on_one_device), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_another_seed_takes_other_steps(on_one_device):
    (_, ours), (_, theirs) = on_one_device, take(RANDOM, 1, seed=1)
    assert np.abs(ours[0]["losses"] - theirs[0]["losses"]).min() > 1e-6
    assert (ours[0]["t"] != theirs[0]["t"]).any()


class Triple(nn.Module):
    """Three times each pixel, and a number that has no part in it."""

    @nn.compact
    def __call__(self, x, network_t, dropout_keys=None):
        return 3.0 * x + 0.0 * self.param("number", nn.initializers.ones, ())


def probe_parts(row, x0, x_t, eps, output, probe, slope):
    """The objective of a probed network: J v is 3 v for each of the signs v."""
    error = jnp.abs(slope - 3 * probe).max() + jnp.abs(output - 3 * x_t).max()
    total = jnp.sum(WEIGHTS * probe)
    return error, {"square": jnp.mean(probe**2), "total": total, "total_squared": total**2}


def test_a_probed_objective_has_the_derivative_of_the_output_along_random_signs():
    _, metrics = take(training(network=Triple(), objective=probe_parts, probed=True), 2)
    for found in metrics:
        assert found["loss"] < 1e-6 and found["square"] == 1
        # Each example has signs of its own: of 16 sums the variance is known to 36 %, twice of which is allowed.
        variance = (found["total_squared"] - found["total"] ** 2) / np.sum(WEIGHTS**2)
        assert 0.3 < variance < 2
    assert metrics[0]["total"] != metrics[1]["total"]
