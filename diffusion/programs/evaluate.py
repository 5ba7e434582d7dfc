"""--mode=eval: which images are scored, by which protocol, and the numbers and curves of a trained model."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion import likelihood
from diffusion.data import Source
from diffusion.data.source import Splits
from diffusion.evaluation import images
from diffusion.evaluation.bound import Bound, estimated_bound, full_bound
from diffusion.evaluation.limit import for_protocol, limit, points
from diffusion.evaluation.pairs import PRECISION
from diffusion.experiment import build, memory, results, workdir
from diffusion.experiment.build import Experiment
from diffusion.experiment.workdir import EmaState
from diffusion.model import Model
from diffusion.reporting import page, plots, summary
from diffusion.runtime import devices, files, processes
from diffusion.runtime.digests import short_sha256, tree_sha256
from diffusion.runtime.preemption import Preemption

EVALUATIONS = "evaluations"  # in the workdir: a folder for each evaluation that --mode=eval made
LIMIT = ("test_bpd", "test_bpd_stderr", "test_bpd_sampling_stderr", "test_kl_bpd")  # also said of T = ∞
UNFINISHED = "unfinished_eval"  # beside the results: the terms that are done


def run(config: ConfigDict, directory: Path, checkpoint: str = "latest", output: str = "") -> None:
    """Scores a checkpoint of `directory`, and leaves what the run itself wrote as it is.

    The results go into a folder that is named by what was measured; eval.json is a copy of the last ones.

    Args:
        output: a directory for both; "" for the run's own. With it, nothing is written into the run.

    Raises:
        ValueError: no image is to be scored, besides what `results.place` and `workdir.load` raise.
    """
    if config.eval.num_images == images.NONE:
        raise ValueError("eval.num_images=-1 scores no image; --config.eval.num_images=0 scores all of the test set")
    num_test = build.describe_data(config).num_test
    num_images = images.num_scored(config.eval.num_images, config.eval.protocol, num_test)
    place = results.place(directory, output, EVALUATIONS)
    loaded = workdir.load(directory, checkpoint, config, claims=not output)
    experiment, state, model = loaded.experiment, loaded.state, loaded.model_with(config.eval.variance)
    with Preemption() as preemption, contextlib.ExitStack() as stack:
        with preemption.at_points():
            splits = build.load_splits(config)
        check_labels(config, splits)
        data_sha256 = processes.on_first(splits.sha256)
        measured = short_sha256([state.sha256, data_sha256, tree_sha256(model.schedule.x0_variance)])
        out = place / EVALUATIONS / f"{name(experiment, int(state.step), num_images)}-{measured}"
        stack.enter_context(workdir.locked(out))
        with memory.shortage_explained(experiment, "eval.batch_size"):
            scores = score(experiment, out, model, state, splits, preemption.check)
        if processes.is_first():
            summary.write_json(out / "eval.json", scores)
            summary.write_json(place / "eval.json", scores)
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


def name(experiment: Experiment, step: int, num_images: int) -> str:
    """What a reader tells evaluations apart by: checkpoint, protocol, variance, estimator and images."""
    settings = experiment.config.eval
    variance = experiment.p.variance if settings.variance == "model" else settings.variance
    terms = f"{settings.terms_per_image}terms" if settings.terms_per_image else "all"
    return f"step{step}-{settings.protocol}-{variance}-{terms}-{num_images}images"


def score(
    experiment: Experiment,
    directory: Path,
    model: Model,
    state: EmaState,
    splits: Splits,
    stop: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Scores the EMA parameters on the test split and on as many validation and training images.

    A conditional network gets their labels.

    A network that also knows images without their labels is scored without them, too, on the same test images.

    With eval.num_images=-1 nothing is scored.

    A call that was interrupted continues where it stopped. Where every term is computed, process 0 writes bpd.npz,
    bpd.png and rate_distortion.png.

    Args:
        experiment: says how it is scored.
        directory: where the curves go, and the terms that are done.
        model: of the parameters of `state`, with the variance that is scored.
        state: on the host.
        splits: what is scored.
        stop: called between batches; raises to stop.

    Returns:
        The entries of summary.json that say what was scored, how, and how well; on process 0 alone, {} elsewhere.
    """
    config, about = experiment.config, _about(state, splits)
    if config.eval.num_images == images.NONE:
        return about if processes.is_first() else {}
    num_images = images.num_scored(config.eval.num_images, config.eval.protocol, len(splits.test))
    model = for_protocol(model, config.eval.protocol)
    # Where the whole split is scored, a protocol drops its last images.
    is_whole = config.eval.num_images == 0
    numbers = {
        "test": np.arange(num_images) if is_whole else images.subset(len(splits.test), num_images),
        "train": images.subset(len(splits.train), min(num_images, len(splits.train))),
    }
    if len(splits.validation):
        numbers["validation"] = images.subset(len(splits.validation), min(num_images, len(splits.validation)))
    sources = {split: getattr(splits, split) for split in numbers}
    kept = directory / UNFINISHED / _key(config, model, [state.sha256, about["data_sha256"]], numbers)
    bounds = _bounds(config, model, sources, numbers, kept, stop)
    if not processes.is_first():
        return {}
    protocol = protocol_of(experiment, model.p.variance) | {
        f"{split}_images": f"{len(numbers[split])} of {len(source)}" for split, source in sources.items()
    }
    if not config.eval.terms_per_image:
        title = f"{splits.test.name}, {num_images} test images, protocol {config.eval.protocol}"
        _save_curves(directory, bounds, protocol, title, splits.test.num_levels)
    _forget(kept)
    return {
        "step": about["step"],
        "num_params": about["num_params"],
        "protocol": protocol,
        **{name: value for split in numbers for name, value in bounds[split].summary(split).items()},
        **_of_limit(bounds),
        **_by_label(bounds, splits.test, numbers["test"], config.model.conditional),
        "prior_bpd": bounds["test"].prior_bpd.mean(),
        **about,
    }


def _about(state: EmaState, splits: Splits) -> dict[str, Any]:
    """What is known of weights and data without scoring them."""
    return {
        "step": int(state.step),
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(state.ema_params)),
        "validation_images": len(splits.validation),
        "ema_sha256": state.sha256,
        "data_sha256": processes.on_first(splits.sha256),
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


def _key(config: ConfigDict, model: Model, digests: list[Any], numbers: dict[str, np.ndarray]) -> str:
    """A name for where finished terms are kept, made of all that a term depends on: nothing else finds them."""
    variance = model.p.variance, tree_sha256(model.schedule.x0_variance)
    scored = [chosen.tolist() for chosen in numbers.values()]
    few = [config.eval.terms_per_image] if config.eval.terms_per_image else []
    return short_sha256([*digests, config.seed, config.eval.protocol, variance, *few, *scored])


def _forget(kept: Path) -> None:
    shutil.rmtree(kept, ignore_errors=True)
    with contextlib.suppress(OSError):  # another, interrupted evaluation has its terms there
        kept.parent.rmdir()


def protocol_of(experiment: Experiment, variance: str) -> dict[str, Any]:
    """How the bits/dim are measured: what a reader must know to compare them with others."""
    config = experiment.config
    few, chosen = config.eval.terms_per_image, likelihood.PROTOCOLS[config.eval.protocol]
    num_steps, decoder, at_limit = config.schedule.num_steps, config.model.decoder, {}
    if chosen.kl_terms:
        num_steps, decoder = chosen.kl_terms + 1, "bayes"
        at_limit = {"limit": f"T = ∞, two samples of {points(build.bound_settings(config))} instants"}
    return {
        "name": config.eval.protocol,
        "decoder_cdf": chosen.decoder_cdf,
        "x0_clipped": chosen.clip_x0,
        "parameters": f"EMA, length {config.ema.length:g}" if config.ema.length else f"EMA, decay {config.ema.decay:g}",
        "variance": variance,
        "schedule": config.schedule.name,
        "num_steps": num_steps,
        **at_limit,
        **({"decoder": decoder} if decoder != "network" else {}),
        **({"labels": "given"} if config.model.conditional else {}),
        "estimator": f"{few} terms per image: t = 1 and two samples of {few // 2}" if few else "every term",
        "draws_per_term": 1,
        "matmul_precision": PRECISION,
        "network_dtype": str(getattr(experiment.training.network, "dtype", "float32")),
        "seed": config.seed,
    }


def _save_curves(directory: Path, bounds: dict[str, Bound], protocol: dict, title: str, num_levels: int) -> None:
    """Writes bpd.npz with every curve's numbers and how they were measured, bpd.png and rate_distortion.png."""
    test, train = bounds["test"], bounds["train"]
    test_terms, train_terms = (of.terms_bpd.mean(axis=0) for of in (test, train))
    rate_bpd, rmse = test.progressive_coding()
    with files.replacing(directory / "bpd.npz") as file:
        np.savez_compressed(
            file,
            protocol=json.dumps(protocol),
            test_terms_bpd=test_terms,
            train_terms_bpd=train_terms,
            test_image_bpd=test.image_bpd,
            train_image_bpd=train.image_bpd,
            test_rate_bpd=rate_bpd,
            test_distortion_rmse=rmse,
        )
    plots.plot_bpd(directory / "bpd.png", test_terms, train_terms, test.prior_bpd.mean(), title)
    plots.plot_rate_distortion(directory / "rate_distortion.png", rate_bpd, rmse, num_levels, title)
