"""Scoring a trained model: which images, by which protocol, and the numbers and curves that come of it."""

import contextlib
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from diffusion import build, data, files, likelihood, parallel, plots, report, variances, workdir
from diffusion.bound import Bound, bound_of, estimated_bound_of
from diffusion.build import Experiment
from diffusion.data import ImageSet
from diffusion.digests import tree_sha256
from diffusion.state import TrainState

UNFINISHED = "unfinished_eval"  # in the workdir: the terms that are done


def run(config: ConfigDict, directory: Path) -> None:
    """--mode=eval: scores the latest checkpoint of `directory`, and leaves what the run itself wrote as it is."""
    described = data.describe(config.data.name, config.data.data_dir)
    experiment = build.experiment(config, described.image_shape, described.num_levels)
    num_scored(config, described.num_test)
    state = workdir.restore(experiment, directory)
    train_set, test_set = (data.load(config.data.name, split, config.data.data_dir) for split in ("train", "test"))
    estimate = variances.load(directory, int(state.step)) if config.eval.variance == "optimal" else None
    experiment = experiment.with_variance(config.eval.variance, estimate)
    summary = score(experiment, directory, state, train_set, test_set, prefix="eval_")
    report.write_json(directory / "eval.json", summary)
    print(json.dumps(summary, indent=2))


def num_scored(config: ConfigDict, num_test: int) -> int:
    """How many of the test images are scored, and at most as many training images.

    Raises:
        ValueError: fewer exist than eval.num_images asks for, or than eval.protocol needs.
    """
    wanted = config.eval.num_images or num_test
    if wanted > num_test:
        raise ValueError(f"eval.num_images={wanted} exceeds the {num_test} images of the test split")
    multiple = likelihood.PROTOCOLS[config.eval.protocol].images_multiple
    if wanted < multiple:
        raise ValueError(
            f"eval.protocol={config.eval.protocol!r} scores multiples of {multiple} images, "
            f"not {wanted} (eval.num_images={config.eval.num_images}, {num_test} test images)"
        )
    return wanted // multiple * multiple


def score(
    experiment: Experiment,
    directory: Path,
    state: TrainState,
    train_set: ImageSet,
    test_set: ImageSet,
    prefix: str = "",
) -> dict[str, Any]:
    """Scores the EMA parameters on the test split and on as many training images.

    Where every term is computed, writes bpd.npz, bpd.png and rate_distortion.png too, with `prefix` before the names,
    and a call that was cut goes on where it ended.

    Returns:
        The entries of summary.json that say what was scored, how, and how well.
    """
    config = experiment.config
    num_images = num_scored(config, len(test_set.images))
    num_train = min(num_images, len(train_set.images))
    bound = estimated_bound_of(experiment) if config.eval.terms_per_image else bound_of(experiment)
    params = parallel.replicate(state.ema_params)
    # Of a whole split it is the last images that a protocol drops.
    is_whole = config.eval.num_images == 0
    test_numbers = np.arange(num_images) if is_whole else subset(len(test_set.images), num_images)
    train_numbers = subset(len(train_set.images), num_train)
    ema_sha256 = tree_sha256(state.ema_params)
    kept = _kept(directory, experiment, ema_sha256, test_numbers, train_numbers)
    # Several processes would have to agree on what is missing; they start over.
    if config.eval.terms_per_image or jax.process_count() > 1:
        test, train = bound(params, test_set, test_numbers), bound(params, train_set, train_numbers)
    else:
        test = bound(params, test_set, test_numbers, kept / "test.npy")
        train = bound(params, train_set, train_numbers, kept / "train.npy")
    protocol = protocol_of(experiment) | {
        "test_images": f"{num_images} of {len(test_set.images)}",
        "train_images": f"{num_train} of {len(train_set.images)}",
    }
    if not config.eval.terms_per_image:
        title = f"{test_set.name}, {num_images} test images, protocol {config.eval.protocol}"
        _save_curves(directory, prefix, test, train, protocol, title, test_set.num_levels)
        shutil.rmtree(kept, ignore_errors=True)
        with contextlib.suppress(OSError):  # another evaluation, which was cut, has its terms there
            kept.parent.rmdir()
    return {
        "step": int(state.step),
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "protocol": protocol,
        **test.summary("test"),
        **train.summary("train"),
        "prior_bpd": test.prior_bpd.mean(),
        "params_sha256": tree_sha256(state.params),
        "ema_sha256": ema_sha256,
    }


def _kept(directory: Path, experiment: Experiment, ema_sha256: str, *numbers: np.ndarray) -> Path:
    """Where finished terms are kept. All that a term depends on names the folder, so that nothing else finds it."""
    config, variance = experiment.config, (experiment.p.variance, tree_sha256(experiment.x0_variance))
    key = json.dumps([ema_sha256, config.seed, config.eval.protocol, variance, *(n.tolist() for n in numbers)])
    return directory / UNFINISHED / hashlib.sha256(key.encode()).hexdigest()[:16]


def protocol_of(experiment: Experiment) -> dict[str, Any]:
    """How the bits/dim are measured: what a reader must know to compare them with others."""
    config = experiment.config
    few = config.eval.terms_per_image
    return {
        "name": config.eval.protocol,
        "decoder_cdf": likelihood.PROTOCOLS[config.eval.protocol].decoder_cdf,
        "x0_clipped": True,
        "parameters": f"EMA, decay {config.ema.decay:g}",
        "variance": experiment.p.variance,
        "schedule": config.schedule.name,
        "num_steps": config.schedule.num_steps,
        "estimator": f"{few} terms per image: t = 1 and two samples of {few // 2}" if few else "every term",
        "draws_per_term": 1,
        "seed": config.seed,
    }


def _save_curves(
    directory: Path, prefix: str, test: Bound, train: Bound, protocol: dict, title: str, num_levels: int
) -> None:
    """Writes bpd.npz with every curve's numbers and how they were measured, bpd.png and rate_distortion.png."""
    test_terms = test.terms_bpd.mean(axis=0)
    rate_bpd, rmse = test.progressive_coding()
    with files.replacing(directory / f"{prefix}bpd.npz") as file:
        np.savez_compressed(
            file,
            protocol=json.dumps(protocol),
            test_terms_bpd=test_terms,
            train_terms_bpd=train.terms_bpd.mean(axis=0),
            test_image_bpd=test.image_bpd,
            train_image_bpd=train.image_bpd,
            test_rate_bpd=rate_bpd,
            test_distortion_rmse=rmse,
        )
    plots.plot_bpd(directory / f"{prefix}bpd.png", test_terms, test.prior_bpd.mean(), title)
    plots.plot_rate_distortion(directory / f"{prefix}rate_distortion.png", rate_bpd, rmse, num_levels, title)


def subset(num_existing: int, num_images: int) -> Int[np.ndarray, " {num_images}"]:
    """The numbers of a fixed random choice of images. (Of a set sorted by class the first ones are one class.)"""
    return np.sort(np.random.RandomState(0).permutation(num_existing)[:num_images])
