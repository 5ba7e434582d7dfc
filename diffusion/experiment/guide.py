"""Autoguidance from a config: `sample.guide` names the worse model that samples are guided with."""

import jax
import numpy as np

from diffusion import guidance
from diffusion.experiment import workdir
from diffusion.experiment.build import Experiment
from diffusion.experiment.workdir import LoadedRun


def load(experiment: Experiment) -> LoadedRun | None:
    """The run or the export that sample.guide names, if it names one.

    Raises:
        ValueError: it cannot guide this experiment, in one line; or what `workdir.load` raises.
        FileNotFoundError: there is no such run or no such checkpoint.
    """
    if not experiment.config.sample.guide:
        return None
    if experiment.learns_schedule:
        schedule = experiment.config.schedule.name
        raise ValueError(
            f"sample.guide={experiment.config.sample.guide!r} needs the noise schedule of this run, and "
            f"schedule.name={schedule!r} is learned: no other checkpoint has the same"
        )
    found = workdir.load(experiment.config.sample.guide, claims=False)
    if problem := _problem(experiment, found):
        raise ValueError(f"sample.guide={experiment.config.sample.guide!r} {problem}")
    return found


def network(experiment: Experiment, found: LoadedRun) -> jax.tree_util.Partial:
    """A guide's network, as a function of what this experiment's network takes."""
    denoise = found.model.denoise
    is_blind = experiment.config.model.conditional and not found.model.takes_labels
    return guidance.blind(denoise) if is_blind else denoise


def _problem(experiment: Experiment, found: LoadedRun) -> str:
    """Why a model cannot guide this one; "" if it can."""
    own, its = experiment.config.model, found.config.model
    if (experiment.image_shape, experiment.training.num_levels) != (found.image_shape, found.model.num_levels):
        return f"is of images {found.image_shape}, and this run of {experiment.image_shape}"
    if own.prediction != its.prediction:
        return f"predicts {its.prediction}, and this run has model.prediction={own.prediction!r}"
    if its.conditional and not own.conditional:
        return "takes labels, which this run has not (model.conditional)"
    if its.conditional and found.experiment.training.network.num_classes != experiment.training.network.num_classes:
        return "takes labels of other classes"
    schedule = experiment.training.schedule.of_params({})
    for name in ("log_snr", "network_t"):
        tables = [np.asarray(getattr(each, name)) for each in (schedule, found.model.schedule)]
        if tables[0].shape != tables[1].shape or not np.allclose(*tables, rtol=1e-5, atol=1e-5):
            return (
                f"has schedule.name={found.config.schedule.name!r} with model.conditioning={its.conditioning!r}: other "
                f"noise at the same input than schedule.name={experiment.config.schedule.name!r} here"
            )
    return ""
