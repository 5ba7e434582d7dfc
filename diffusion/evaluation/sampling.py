"""Images of a model. Image n depends on the seed and on n, and not on the batch size or the devices."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt8

from diffusion import guidance, samplers, schedules
from diffusion.data.levels import to_levels
from diffusion.grids import Grid
from diffusion.model import Model
from diffusion.reporting.progress import Progress
from diffusion.runtime import devices, randomness
from diffusion.samplers import Step
from diffusion.schedules import Schedule

TRAJECTORY_FRAMES = 12


class Walked(NamedTuple):
    """The inputs of sampling: the model with the chosen steps as its schedule, and what only some samplers need."""

    model: Model
    levels: Schedule | None  # that churn takes its noise levels from
    guide: Callable[..., Array] | None
    clock: guidance.Clock | None  # of a guide with another schedule


class Sampler:
    """Draws pixel values from any model of one kind, with one compiled program.

    Image n is the same for every batch size and number of devices.
    """

    def __init__(
        self,
        step: Step,
        image_shape: tuple[int, int, int],
        seed: int,
        batch_size: int,
        num_steps: int | None = None,
        labels: tuple[int, ...] = (),
        guidance_scale: float | int = 0.0,
        guidance_interval: tuple[float | int, ...] = (),
        grid: Grid = schedules.evenly_spaced,
        guide: Callable[..., Array] | None = None,
        guide_schedule: Schedule | None = None,
        guide_sha256: str = "",
    ):
        """Nothing is compiled before the first image.

        Args:
            step: the step from x_t to x_{t−1}.
            image_shape: (H, W, C).
            seed: the seed of all noise.
            batch_size: the number of images drawn at once, on all devices together.
            num_steps: the number of steps of the model's schedule, chosen by `grid`; None for all.
            labels: the labels of the images, repeated in turn, if the model takes labels.
            guidance_scale: w of `guidance.classifier_free`; with a guide, w of `guidance.autoguided`.
            guidance_interval: the t that are guided, as in these functions.
            grid: one of `grids.GRIDS`.
            guide: a worse network than the models', a pytree with the same arguments.
            guide_schedule: the schedule with which the guide was trained; None for that of the models.
            guide_sha256: the digest of the guide's weights, under which its images are kept.
        """
        self._step, self.image_shape, self.guide_sha256 = step, image_shape, guide_sha256
        self._seed_key, self._batch_size, self._num_steps = randomness.stream(seed, "sample"), batch_size, num_steps
        self._grid, self._guide, self._guide_schedule = grid, guide, guide_schedule
        self._labels, self._guidance = jnp.array(labels), (guidance_scale, guidance_interval)
        self._images = devices.over_batches(self._draw_images)
        self._trajectories = devices.over_batches(self._draw_trajectories)

    def batches(
        self, model: Model, num_images: int, is_done: Bool[np.ndarray, " n"] | None = None
    ) -> Iterator[tuple[Int[np.ndarray, " b"], UInt8[np.ndarray, "b h w c"]]]:
        """The numbers and the pixel values of the first images, batch by batch.

        Args:
            is_done: whether each image is done. A batch with only such images is left out; the other batches do not
                change.
        """
        is_done = np.zeros(num_images, bool) if is_done is None else is_done
        items = np.arange(num_images), self._batch_size, None, is_done
        with Progress(num_images, initial=int(is_done.sum()), desc="sample", unit="image") as progress:
            for numbers, images in self._images(self._replicated(model), *items):
                yield numbers, images
                progress.update(int((~is_done[numbers]).sum()))

    def images(self, model: Model, num_images: int) -> UInt8[np.ndarray, "n h w c"]:
        """The first images, pixel values."""
        return np.concatenate([images for _, images in self.batches(model, num_images)])

    def trajectories(self, model: Model, num_images: int) -> UInt8[np.ndarray, "n f h w c"]:
        """The x̂_0 of the first images from noise to data, as pixel values."""
        found = self._trajectories(self._replicated(model), np.arange(num_images), self._batch_size)
        return np.concatenate([frames for _, frames in found])

    def _replicated(self, model: Model) -> devices.Replicated:
        levels, its = None if self._step.churn is None else model.schedule, self._guide_schedule
        clock = None if its is None else guidance.clock(model.schedule, its)
        if self._num_steps is not None:
            model = dataclasses.replace(model, schedule=self._grid(model.schedule, self._num_steps))
        return devices.replicate(Walked(model, levels, self._guide, clock))

    def _draw_images(self, walked: Walked, numbers: Int[Array, " n"]) -> UInt8[Array, "n h w c"]:
        return to_levels(self._draw(walked, numbers, num_frames=1)[0], walked.model.num_levels)

    def _draw_trajectories(self, walked: Walked, numbers: Int[Array, " n"]) -> UInt8[Array, "n f h w c"]:
        model = walked.model
        _, frames = self._draw(walked, numbers, min(TRAJECTORY_FRAMES, model.schedule.num_steps))
        return to_levels(jnp.swapaxes(frames, 0, 1), model.num_levels)  # the images first, as everywhere in a batch

    def _draw(self, walked: Walked, numbers: Int[Array, " n"], num_frames: int) -> tuple[Array, Array]:
        model = walked.model
        keys, denoise = randomness.per_item(self._seed_key, numbers), model.denoise
        if walked.guide is not None:
            denoise = guidance.autoguided(denoise, walked.guide, *self._guidance, walked.clock)
        if model.takes_labels:
            labels = self._labels[numbers % len(self._labels)]
            is_guided = walked.guide is not None
            denoise = guidance.classifier_free(denoise, labels, *((0,) if is_guided else self._guidance))
        more = {"num_frames": num_frames, "levels": walked.levels}
        return samplers.sample(self._step, denoise, model.p, model.schedule, keys, self.image_shape, **more)
