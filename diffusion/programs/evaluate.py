"""--mode=eval: the choice of images and protocol, and the scores and curves of a trained model."""

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from diffusion import likelihood
from diffusion.data import Source
from diffusion.data.source import Splits
from diffusion.evaluation import images
from diffusion.evaluation.bound import Bound, estimated_bound, full_bound
from diffusion.evaluation.likelihoods import Likelihood
from diffusion.evaluation.limit import for_protocol, limit
from diffusion.experiment import build, memory, other_likelihood, results, workdir
from diffusion.experiment.build import Experiment
from diffusion.experiment.workdir import EmaState
from diffusion.model import Model
from diffusion.programs import likelihoods, scored
from diffusion.reporting import page, summary
from diffusion.runtime import devices, processes
from diffusion.runtime.digests import short_sha256, tree_sha256
from diffusion.runtime.preemption import Preemption

EVALUATIONS = "evaluations"  # in the workdir: a folder for each evaluation that --mode=eval made
LIMIT = ("test_bpd", "test_bpd_stderr", "test_bpd_sampling_stderr", "test_kl_bpd")  # also said of T = ∞


def run(config: ConfigDict, directory: Path, checkpoint: str = "latest", output: str = "") -> None:
    """Scores a checkpoint of `directory`. The files that the run itself wrote do not change.

    The results go into a folder with a name that describes the measurement; eval.json is a copy of the latest results.
    If eval.likelihood is not the bound, this likelihood is measured instead, and the file has its name:
    importance.json, ode.json.

    Args:
        output: a directory for both; "" for the run's own. With it, nothing is written into the run.

    Raises:
        ValueError: no image is to be scored, or an error of `results.place` or `workdir.load`.
    """
    if config.eval.num_images == images.NONE:
        raise ValueError("eval.num_images=-1 scores no image; --config.eval.num_images=0 scores all of the test set")
    other = other_likelihood.alone(config)
    num_test = build.describe_data(config).num_test
    num_images = images.num_scored(config.eval.num_images, config.eval.protocol, num_test)
    place = results.place(directory, output, EVALUATIONS)
    loaded = workdir.load(directory, checkpoint, config, claims=not output)
    experiment, state, model = loaded.experiment, loaded.state, loaded.model_with(config.eval.variance)
    file = f"{other.KIND}.json" if other else "eval.json"
    measure = functools.partial(likelihoods.score, other) if other else score
    with Preemption() as preemption, contextlib.ExitStack() as stack:
        with preemption.at_points():
            splits = build.load_splits(config)
        check_labels(config, splits)
        data_sha256 = processes.on_first(splits.sha256)
        measured = short_sha256([state.sha256, data_sha256, tree_sha256(model.schedule.x0_variance)])
        out = place / EVALUATIONS / f"{name(experiment, int(state.step), num_images, other)}-{measured}"
        stack.enter_context(workdir.locked(out))
        with memory.shortage_explained(experiment, "eval.batch_size"):
            scores = measure(experiment, out, model, state, splits, preemption.check)
        if processes.is_first():
            summary.write_json(out / file, scores)
            summary.write_json(place / file, scores)
            if not output:
                page.refresh(directory)
            print(json.dumps(scores, indent=2))


def check_labels(config: ConfigDict, splits: Splits) -> None:
    """Raises a ValueError if a conditional network would train on, or be scored on, an image without a known label."""
    if not config.model.conditional:
        return
    for source in (splits.train, splits.validation):
        source.labels()
    if config.eval.num_images != images.NONE:
        try:
            splits.test.labels()
        except ValueError as error:
            raise ValueError(f"{error}; eval.num_images=-1 trains without scoring") from error


def name(experiment: Experiment, step: int, num_images: int, other: Likelihood | None = None) -> str:
    """A name that distinguishes evaluations: checkpoint, protocol, variance, estimator and images."""
    settings = experiment.config.eval
    variance = experiment.p.variance if settings.variance == "model" else settings.variance
    if other:
        return f"step{step}-{other.name(settings.protocol, variance)}-{num_images}images"
    every = "all" if settings.noises_per_term == 1 else f"all{settings.noises_per_term}noises"
    terms = f"{settings.terms_per_image}terms" if settings.terms_per_image else every
    return f"step{step}-{settings.protocol}-{variance}-{terms}-{num_images}images"


def score_run(experiment: Experiment, *given: Any) -> dict[str, Any]:
    """The result of `score`, with the entries of another likelihood if eval.likelihood names one.

    Args:
        given: the arguments of `score` after the experiment.
    """
    return score(experiment, *given, further=functools.partial(likelihoods.after_bound, experiment, *given))


def score(
    experiment: Experiment,
    directory: Path,
    model: Model,
    state: EmaState,
    splits: Splits,
    stop: Callable[[], None] | None = None,
    further: Callable[[], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """Scores the EMA parameters on the test split and on as many validation and training images.

    A conditional network gets their labels. A network that also knows images without their labels is scored without
    them, too, on the same test images.

    With eval.num_images=-1 nothing is scored.

    A call that was interrupted continues where it stopped. Where every term is computed, process 0 writes bpd.npz,
    bpd.png and rate_distortion.png.

    Args:
        experiment: its config has the settings of the evaluation.
        directory: the place of the curves and of finished terms.
        model: the model of the parameters of `state`, with the variance to score.
        state: the state, on the host.
        splits: the splits to score.
        stop: called between batches; it raises to stop.
        further: measures more entries, perhaps for hours. The finished terms are deleted after it.

    Returns:
        The entries of summary.json about the images, the protocol and the scores, on process 0 alone; {} elsewhere.
    """
    config, about = experiment.config, scored.about(state, splits)
    if config.eval.num_images == images.NONE:
        return about if processes.is_first() else {}
    num_images = images.num_scored(config.eval.num_images, config.eval.protocol, len(splits.test))
    model = for_protocol(model, config.eval.protocol)
    sources, numbers = scored.chosen_images(config, splits)
    kept = directory / scored.UNFINISHED / scored.key(config, model, [state.sha256, about["data_sha256"]], numbers)
    bounds = _bounds(config, model, sources, numbers, kept, stop)
    others = further()
    if not processes.is_first():
        return {}
    protocol = scored.protocol_of(experiment, model.p.variance) | {
        f"{split}_images": f"{len(numbers[split])} of {len(source)}" for split, source in sources.items()
    }
    if not config.eval.terms_per_image:
        title = f"{splits.test.name}, {num_images} test images, protocol {config.eval.protocol}"
        scored.save_curves(directory, bounds, protocol, title, splits.test.num_levels)
    scored.forget(kept)
    return {
        "step": about["step"],
        "num_params": about["num_params"],
        "protocol": protocol,
        **{name: value for split in numbers for name, value in bounds[split].summary(split).items()},
        "test_numbers_sha256": short_sha256(numbers["test"].tolist()),
        **_of_limit(bounds),
        **_by_label(bounds, splits.test, numbers["test"], config.model.conditional),
        "prior_bpd": bounds["test"].prior_bpd.mean(),
        **about,
        **others,
    }


def _bounds(
    config: ConfigDict,
    model: Model,
    sources: dict[str, Source],
    numbers: dict[str, np.ndarray],
    kept: Path,
    stop: Callable[[], None] | None,
) -> dict[str, Bound]:
    """The bound by split, from a few terms of each image or from every term, which are kept on disk meanwhile.

    A network trained with label dropout also gets "unconditional", the test split's bound without labels; a protocol
    of VDM's bound also "limit", the test split's for T = ∞.
    """
    settings, replicated = build.bound_settings(config), devices.replicate(model)
    scored = {split: (replicated, sources[split], numbers[split]) for split in sources}
    if config.model.label_dropout:
        scored["unconditional"] = (replicated.part(Model.without_labels), sources["test"], numbers["test"])
    bound = (estimated_bound if settings.terms_per_image else full_bound)(settings, stop)
    bounds = {name: bound(*what, kept / f"{name}.npy") for name, what in scored.items()}
    if likelihood.PROTOCOLS[settings.protocol].kl_terms:
        bounds["limit"] = limit(settings, stop)(*scored["test"], bounds["test"], kept / "limit.npy")
    return bounds


def _of_limit(bounds: dict[str, Bound]) -> dict[str, Any]:
    """The test images' bound for T = ∞, where a protocol has it."""
    if "limit" not in bounds:
        return {}
    found = bounds["limit"].summary("test")
    return {name.replace("test_", "test_limit_"): found[name] for name in LIMIT}


def _by_label(bounds: dict[str, Bound], test_set: Source, numbers: np.ndarray, is_given: bool) -> dict[str, Any]:
    """The test images' bits by class; of a network that is given labels also what these cost, and what they save."""
    scores: dict[str, Any] = {}
    if is_given:
        scores["label_bpd"] = likelihood.label_bpd(test_set.num_classes, test_set.image_shape)
        for split in (name for name in bounds if name not in ("unconditional", "limit")):
            given_bpd = bounds[split].summary(split)[f"{split}_bpd"]
            scores[f"{split}_with_label_bpd"] = given_bpd + scores["label_bpd"]
    if test_set.num_classes:
        by_class = bounds["test"].bpd_by_class(test_set.labels(numbers, complete=False), test_set.num_classes)
        if any(bpd is not None for bpd in by_class):
            scores["test_bpd_by_class"] = by_class
    if "unconditional" in bounds:
        without, given = bounds["unconditional"].summary("test"), bounds["test"].image_bpd
        saved = bounds["unconditional"].image_bpd - given  # image by image: what is common to both cancels
        scores |= {
            "test_unconditional_bpd": without["test_bpd"],
            "test_unconditional_bpd_stderr": without["test_bpd_stderr"],
            "test_label_gain_bpd": saved.mean(),
            "test_label_gain_bpd_stderr": saved.std(ddof=1) / len(saved) ** 0.5 if len(saved) > 1 else None,
        }
    return scores
