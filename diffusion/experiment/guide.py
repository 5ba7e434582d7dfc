"""Autoguidance from a config: `sample.guide` names the worse model that samples are guided with.

It may have another noise schedule; any two learned schedules differ. It is evaluated at the same log SNR:
    `guidance.clock`.
"""

import jax
import numpy as np

from diffusion import guidance
from diffusion.experiment import workdir
from diffusion.experiment.build import Experiment
from diffusion.experiment.workdir import LoadedRun
from diffusion.guidance import TOLERANCE


def load(experiment: Experiment) -> LoadedRun | None:
    """The run or the export that sample.guide names, or None.

    Raises:
        ValueError: it cannot guide this experiment, or an error of `workdir.load`.
        FileNotFoundError: there is no such run or no such checkpoint.
    """
    if not experiment.config.sample.guide:
        return None
    found = workdir.load(experiment.config.sample.guide, claims=False)
    if problem := _problem(experiment, found):
        raise ValueError(f"sample.guide={experiment.config.sample.guide!r} {problem}")
    return found


def network(experiment: Experiment, found: LoadedRun) -> jax.tree_util.Partial:
    """A guide's network, as a function with the arguments of this experiment's network."""
    denoise = found.model.denoise
    is_blind = experiment.config.model.conditional and not found.model.takes_labels
    return guidance.blind(denoise) if is_blind else denoise


def _problem(experiment: Experiment, found: LoadedRun) -> str:
    """Why a model cannot guide this one; "" if it can."""
    own, its = experiment.config.model, found.config.model
    if (experiment.image_shape, experiment.training.num_levels) != (found.image_shape, found.model.num_levels):
        return f"is of images {found.image_shape}, but this run is of {experiment.image_shape}"
    if own.prediction != its.prediction:
        return f"predicts {its.prediction}, but this run has model.prediction={own.prediction!r}"
    if experiment.p.prediction == "mean" and not _has_same_steps(experiment, found):
        return "predicts the means of other steps; model.prediction='mean' needs a guide with an equal fixed schedule"
    if its.conditional and not own.conditional:
        return "takes labels, but this run has none (model.conditional)"
    if its.conditional and found.experiment.training.network.num_classes != experiment.training.network.num_classes:
        return "takes labels of another number of classes"
    return ""


def _has_same_steps(experiment: Experiment, found: LoadedRun) -> bool:
    """Whether both have the same steps, not only the same noise: μ̃_t also depends on x_{t−1}'s noise."""
    own, its = (np.asarray(schedule.log_snr)[1:] for schedule in (experiment.start_schedule, found.model.schedule))
    is_fixed = not (experiment.learns_schedule or found.experiment.learns_schedule)
    return is_fixed and own.shape == its.shape and np.allclose(own, its, rtol=TOLERANCE, atol=TOLERANCE)
