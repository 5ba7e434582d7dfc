"""Images of a model: each depends on its number and not on the batch, has its label, and ends its trajectory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import grids, reverse, samplers, schedules
from diffusion.evaluation.sampling import Sampler
from diffusion.model import Model

SHAPE = (4, 4, 1)
X0 = reverse.make("x0", "fixed_small")
MODEL = Model(lambda x, t: 0.3 * x, reverse.make("v", "fixed_small"), schedules.cosine(8), num_levels=17)


def sampler(batch_size=16, **chosen):
    return Sampler(samplers.ancestral(), SHAPE, 0, batch_size, **chosen)


def test_an_image_depends_on_its_number_and_not_on_the_batch():
    few, many = sampler(batch_size=3).images(MODEL, 5), sampler().images(MODEL, 20)
    np.testing.assert_array_equal(few, many[:5])
    assert len({image.tobytes() for image in many}) == 20


def test_a_part_of_the_images_is_drawn_as_if_with_the_others():
    drawn, is_done = sampler(batch_size=8), np.arange(20) < 9
    numbers, images = zip(*drawn.batches(MODEL, 20, is_done), strict=True)
    assert [of_batch.tolist() for of_batch in numbers] == [list(range(8, 16)), list(range(16, 20))]
    np.testing.assert_array_equal(np.concatenate(images), drawn.images(MODEL, 20)[8:])


@pytest.mark.parametrize(("num_steps", "frames"), [(None, 8), (3, 3)])
def test_a_trajectory_has_a_frame_of_each_step_and_ends_on_its_image(num_steps, frames):
    drawn = sampler(num_steps=num_steps)
    trajectories = drawn.trajectories(MODEL, 3)
    assert trajectories.shape == (3, frames, *SHAPE)
    np.testing.assert_array_equal(trajectories[:, -1], drawn.images(MODEL, 3))


def test_the_steps_are_those_of_the_grid():
    """With x̂_0 = network_t/10, whose mean is what x_0 ends on at the last step: t − 1 = 0."""
    model = dataclasses.replace(MODEL, denoise=lambda x, t: jnp.ones_like(x) * t[:, None, None, None] / 10, p=X0)
    frames = sampler(num_steps=3, grid=grids.log_snr).trajectories(model, 1)[0, :, 0, 0, 0]
    chosen = np.asarray(grids.log_snr(MODEL.schedule, 3).network_t[:0:-1])
    np.testing.assert_array_equal(frames, np.round(8 + 8 * chosen / 10))
    even = sampler(num_steps=3).trajectories(model, 1)[0, :, 0, 0, 0]
    assert (frames != even).any()


def test_a_guide_is_what_images_are_drawn_away_from():
    """x̂_0 = 2/8 of the model and 1/8 of the guide, w = 1: 3/8, on a grid of eighths."""
    model = dataclasses.replace(MODEL, denoise=lambda x, t: jnp.full_like(x, 2 / 8), p=X0)
    worse = jax.tree_util.Partial(lambda x, t: jnp.full_like(x, 1 / 8))
    assert (sampler(guide=worse, guidance_scale=1.0).images(model, 2) == 8 + 3).all()


def test_a_guide_with_another_schedule_is_asked_at_the_same_noise():
    """Both say x̂_0 = log SNR/10, each by its own schedule, so guidance adds nothing; also on fewer steps."""

    def told(schedule):
        tables = jnp.asarray(schedule.network_t)[1:], jnp.asarray(schedule.log_snr)[1:]
        return jax.tree_util.Partial(lambda x, t: jnp.zeros_like(x) + jnp.interp(t, *tables)[:, None, None, None] / 10)

    own, its = (schedules.from_gamma(np.linspace(*ends, 9), np.arange(9)) for ends in ((-5, 4), (-6, 5)))
    model = Model(told(own), X0, own, num_levels=17)
    alone = sampler(num_steps=4).images(model, 2)
    guided = sampler(guide=told(its), guide_schedule=its, guidance_scale=2.0, num_steps=4)
    np.testing.assert_array_equal(guided.images(model, 2), alone)


@pytest.mark.parametrize(("scale", "levels"), [(0.0, [3, 7, 3, 7, 3]), (1.0, [7, 15, 7, 15, 7])])
def test_labels_come_in_turn_and_are_guided(scale, levels):
    """With a network that says its label ℓ, which is −1 for none: (1 + w) ℓ + w."""

    def denoise(x, t, labels):
        return jnp.zeros_like(x) + labels[:, None, None, None].astype(jnp.float32) / 8 - 1

    model = Model(denoise, reverse.make("x0", "fixed_small"), schedules.cosine(2), num_levels=17, takes_labels=True)
    images = sampler(labels=(3, 7), guidance_scale=scale).images(model, 5)
    np.testing.assert_array_equal(images[:, 0, 0, 0], levels)
