"""--mode=sample: images from a trained model, as a grid, as a denoising trajectory, and as arrays."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from diffusion import data, schedules
from diffusion.data.levels import to_levels
from diffusion.experiment import build, workdir
from diffusion.experiment.build import Experiment
from diffusion.model import Model
from diffusion.reporting import pictures
from diffusion.reporting.progress import Progress
from diffusion.runtime import files, randomness
from diffusion.training import devices
from diffusion.training.step import TrainState

TRAJECTORY_FRAMES = 12
TRAJECTORY_IMAGES = 8

# (model, number of images N; by default sample.num_images) -> images [N, H, W, C] and the trajectories
# [n, F, H, W, C] of x̂_0 of the first few, pixel values
Sampler = Callable[..., tuple[np.ndarray, np.ndarray]]


def run(config: ConfigDict, directory: Path) -> None:
    """Draws from the latest checkpoint of `directory`."""
    experiment, _, model = trained(config, directory)
    save(directory, *sampler(experiment)(model), model.num_levels)
    print(f"{config.sample.num_images} samples: {directory / 'samples.png'}, {directory / 'samples.npz'}")


def trained(config: ConfigDict, directory: Path) -> tuple[Experiment, TrainState, Model]:
    """The latest checkpoint of `directory`, and the model that the config samples from: the EMA's."""
    described = data.describe(config.data.name, config.data.data_dir)
    experiment = build.experiment(config, described.image_shape, described.num_levels)
    state = workdir.restore(experiment, directory)
    is_optimal = config.sample.variance == "optimal"
    x0_variance = workdir.load_x0_variance(directory, int(state.step)) if is_optimal else None
    return experiment, state, experiment.model(state.ema_params, config.sample.variance, x0_variance)


def sampler(experiment: Experiment) -> Sampler:
    """The config's sampler, compiled once.

    Image n is the same whatever the batch size and the number of devices.
    """
    config, shape = experiment.config.sample, experiment.image_shape
    method = build.sample_method(experiment.config)
    num_steps = config.num_steps or experiment.config.schedule.num_steps
    num_frames = min(TRAJECTORY_FRAMES, num_steps)
    seed_key = randomness.stream(experiment.config.seed, "sample")

    def one_batch(model, numbers):
        keys = randomness.per_item(seed_key, numbers)
        x0, frames = method(model.denoise, model.p, model.schedule, keys, shape=shape, num_frames=num_frames)
        frames = jnp.swapaxes(frames, 0, 1)  # the images first, as everywhere in a batch
        return to_levels(x0, model.num_levels), to_levels(frames, model.num_levels)

    batches = devices.over_batches(one_batch)

    def draw(model: Model, num_images: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        num_images = num_images or config.num_images
        if config.num_steps:
            model = dataclasses.replace(model, schedule=schedules.evenly_spaced(model.schedule, num_steps))
        images, trajectories, missing = [], [], TRAJECTORY_IMAGES
        with Progress(num_images, desc="sample", unit="image") as progress:
            for done, (x0, frames) in batches(devices.replicate(model), np.arange(num_images), config.batch_size):
                images.append(x0)
                trajectories.append(frames[:missing])
                missing -= len(trajectories[-1])
                progress.update(len(done))
        return np.concatenate(images), np.concatenate(trajectories)

    return draw


def save(
    directory: Path,
    images: UInt8[np.ndarray, "n h w c"],
    trajectories: UInt8[np.ndarray, "m f h w c"],
    num_levels: int,
) -> None:
    """Writes samples.png, progressive.png and samples.npz (pixel values, uint8 [N, H, W, C])."""
    pictures.save_png(directory / "samples.png", pictures.image_grid(images, num_levels))
    pictures.save_png(directory / "progressive.png", pictures.trajectory_grid(trajectories, num_levels))
    with files.replacing(directory / "samples.npz") as file:
        np.savez_compressed(file, images=images, num_levels=num_levels)
