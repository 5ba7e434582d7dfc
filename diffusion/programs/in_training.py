"""Samples while a run trains: drawing and measuring them.

A signal stops the drawing after a batch, and the features between two parts of the images.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from diffusion.evaluation.features import BATCH_SIZE
from diffusion.evaluation.sampling import Sampler
from diffusion.experiment import memory
from diffusion.experiment.build import Experiment
from diffusion.programs import sample
from diffusion.programs.quality import Scorer
from diffusion.reporting import page, pictures, plots
from diffusion.reporting.metrics_log import MetricsLog, read_metrics
from diffusion.runtime import processes
from diffusion.runtime.devices import Replicated
from diffusion.training import loop


@contextlib.contextmanager
def _batches(experiment: Experiment, sampler: Sampler, ema_params: Replicated, num_images: int) -> Iterator[Iterator]:
    """What `Sampler.batches` yields for EMA parameters, with the variance that samples are drawn with."""
    model = experiment.model(ema_params.host(), experiment.config.sample.variance)
    with (
        memory.shortage_explained(experiment, "sample.batch_size"),
        contextlib.closing(sampler.batches(model, num_images)) as batches,
    ):
        yield batches


def shower(
    experiment: Experiment, directory: Path, sampler: Sampler, log: MetricsLog
) -> loop.Draw:
    """Shows samples of EMA parameters as samples_STEP.png and to the loggers, if any are wanted."""
    num_previews = min(experiment.config.sample.num_previews, experiment.config.sample.num_images)

    def drawn(ema_params: Replicated, stops: Callable[[], bool]) -> UInt8[np.ndarray, "grid_h grid_w c"] | None:
        # A function of its own: a plotting library may keep its callers' frames, and with them the model's arrays.
        images = []
        with _batches(experiment, sampler, ema_params, num_previews) as batches:
            for _, batch in batches:
                images.append(batch)
                if sum(map(len, images)) < num_previews and stops():
                    return None
        return sample.grid(experiment, np.concatenate(images))

    def show(step: int, ema_params: Replicated, stops: Callable[[], bool], only_missing: bool) -> bool:
        path = directory / f"samples_{step}.png"
        if only_missing and processes.bool_from_first(processes.is_first() and path.exists()):
            return True
        if num_previews:
            if (grid := drawn(ema_params, stops)) is None:
                return False
            pictures.save_png(path, grid)
            log.images(step, "samples", grid)
        if processes.is_first():
            plots.plot_loss(read_metrics(directory), directory / "loss.png")
            page.refresh(directory)
        return True

    return show


def quality_of(experiment: Experiment, sampler: Sampler, scorer: Scorer | None) -> loop.Quality:
    """A function of EMA parameters: the metrics of quality.num_images samples, on process 0."""
    num_images = experiment.config.quality.num_images

    def of_params(ema_params: Replicated, stops: Callable[[], bool]) -> dict[str, float] | None:
        images = []
        with _batches(experiment, sampler, ema_params, num_images) as batches:
            for _, batch in batches:
                images.append(batch)
                if stops():
                    return None
        try:
            numbers = processes.on_first_in_parts(
                lambda parts: scorer.numbers(parts, num_images), _parts(np.concatenate(images)), stops
            )
        except processes.Stopped:
            return None
        return {name: value for name, value in (numbers or {}).items() if value is not None}

    return of_params


def _parts(images: UInt8[np.ndarray, "n h w c"]) -> Iterator[UInt8[np.ndarray, "b h w c"]]:
    """The images in parts, whose features are computed at a time."""
    for begin in range(0, len(images), BATCH_SIZE):
        yield images[begin : begin + BATCH_SIZE]
