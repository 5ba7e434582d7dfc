"""Sampling from a trained model: a grid, a film of x̂_0, and the images themselves."""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree, UInt8
from ml_collections import ConfigDict

from diffusion import build, data, files, parallel, randomness, report, samplers, schedules, variances, workdir
from diffusion.build import Experiment
from diffusion.step import to_levels
from diffusion.variances import X0Variance

FILM_FRAMES = 12
FILM_IMAGES = 8


def run(config: ConfigDict, directory: Path) -> None:
    """--mode=sample: draws from the latest checkpoint of `directory`."""
    described = data.describe(config.data.name, config.data.data_dir)
    experiment = build.experiment(config, described.image_shape, described.num_levels)
    state = workdir.restore(experiment, directory)
    estimate = variances.load(directory, int(state.step)) if config.sample.variance == "optimal" else None
    save(experiment, directory, *sampler(experiment, estimate)(parallel.replicate(state.ema_params)))
    print(f"{config.sample.num_images} samples: {directory / 'samples.png'}, {directory / 'samples.npz'}")


def sampler(
    experiment: Experiment, x0_variance: X0Variance | None = None
) -> Callable[[PyTree], tuple[np.ndarray, np.ndarray]]:
    """The config's sampler, compiled once: replicated parameters -> (images [N, H, W, C], films [n, F, H, W, C]).

    Image n is the same whatever the batch size and the number of devices; grey levels, uint8. The films are of x̂_0
    and of the first few images.

    Raises:
        ValueError: the optimal variance is wanted, and nothing is known of it.
    """
    config = experiment.config.sample
    experiment = experiment.with_variance(config.variance, x0_variance)
    num_steps = config.num_steps or experiment.config.schedule.num_steps
    options = {"shape": experiment.image_shape, "num_frames": min(FILM_FRAMES, num_steps)}
    if config.method == "ddim":
        options["eta"] = config.eta
    method = samplers.SAMPLERS[config.method]
    seed_key = randomness.stream(experiment.config.seed, "sample")

    def one_batch(params, schedule, image_numbers):
        keys = randomness.per_item(seed_key, image_numbers)
        x0, film = method(experiment.denoiser(params), experiment.p, schedule, keys, **options)
        film = jnp.swapaxes(film, 0, 1)  # the images first, as everywhere in a batch
        return to_levels(x0, experiment.num_levels), to_levels(film, experiment.num_levels)

    compiled = parallel.over_devices(one_batch)

    def draw(replicated_params: PyTree) -> tuple[np.ndarray, np.ndarray]:
        schedule = experiment.schedule_of(parallel.unreplicate(replicated_params))
        schedule = parallel.replicate(schedules.evenly_spaced(schedule, num_steps) if config.num_steps else schedule)
        images, films = [], None
        with report.Progress(config.num_images, desc="sample", unit="image") as progress:
            for numbers, num_real in parallel.padded_batches(config.num_images, config.batch_size):
                x0, film = compiled(replicated_params, schedule, numbers)
                images.append(parallel.gather(x0, num_real))
                films = parallel.gather(film, min(num_real, FILM_IMAGES)) if films is None else films
                progress.update(num_real)
        return np.concatenate(images), films

    return draw


def save(
    experiment: Experiment, directory: Path, images: UInt8[np.ndarray, "n h w c"], films: UInt8[np.ndarray, "m f h w c"]
) -> None:
    """Writes samples.png, progressive.png and samples.npz (grey levels, uint8 [N, H, W, C])."""
    levels = experiment.num_levels
    report.save_png(directory / "samples.png", report.image_grid(images, levels))
    report.save_png(directory / "progressive.png", report.film(films, levels))
    with files.replacing(directory / "samples.npz") as file:
        np.savez_compressed(file, images=images, num_levels=levels)
