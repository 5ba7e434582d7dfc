"""The images, the protocol and the files of an evaluation, for every likelihood."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion import likelihood
from diffusion.data import Source
from diffusion.data.source import Splits
from diffusion.evaluation import images
from diffusion.evaluation.bound import Bound
from diffusion.evaluation.limit import points
from diffusion.evaluation.pairs import PRECISION
from diffusion.experiment import build, other_likelihood
from diffusion.experiment.build import Experiment
from diffusion.experiment.workdir import EmaState
from diffusion.model import Model
from diffusion.reporting import plots
from diffusion.runtime import files, processes
from diffusion.runtime.digests import short_sha256, tree_sha256

UNFINISHED = "unfinished_eval"  # beside the results: the terms that are done


def check(config: ConfigDict, num_test: int) -> int:
    """The number of test images that are scored. Raises a ValueError if it, or eval.likelihood, is impossible here."""
    other_likelihood.usable(config)
    return images.num_scored(config.eval.num_images, config.eval.protocol, num_test)


def chosen_images(config: ConfigDict, splits: Splits) -> tuple[dict[str, Source], dict[str, np.ndarray]]:
    """The splits that are scored, and the numbers of their images: the test split, and as many of others.
    """
    test = images.of_test_split(config.eval.num_images, config.eval.protocol, len(splits.test))
    num_images = len(test)
    numbers = {"test": test, "train": images.subset(len(splits.train), min(num_images, len(splits.train)))}
    if len(splits.validation):
        numbers["validation"] = images.subset(len(splits.validation), min(num_images, len(splits.validation)))
    return {split: getattr(splits, split) for split in numbers}, numbers


def about(state: EmaState, splits: Splits) -> dict[str, Any]:
    """Facts about the weights and the data that need no scoring."""
    return {
        "step": int(state.step),
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(state.ema_params)),
        "validation_images": len(splits.validation),
        "ema_sha256": state.sha256,
        "data_sha256": processes.on_first(splits.sha256),
    }


def key(config: ConfigDict, model: Model, digests: list[Any], numbers: dict[str, np.ndarray]) -> str:
    """The name of the place of finished terms, made from everything that a term depends on."""
    variance = model.p.variance, tree_sha256(model.schedule.x0_variance)
    scored = [chosen.tolist() for chosen in numbers.values()]
    few = [config.eval.terms_per_image] if config.eval.terms_per_image else []
    return short_sha256([*digests, config.seed, config.eval.protocol, variance, *few, *scored])


def forget(kept: Path) -> None:
    """Deletes the kept terms of a finished evaluation."""
    shutil.rmtree(kept, ignore_errors=True)
    with contextlib.suppress(OSError):  # another, interrupted evaluation has its terms there
        kept.parent.rmdir()


def protocol_of(experiment: Experiment, variance: str) -> dict[str, Any]:
    """The protocol of the bits/dim: all that a reader must know to compare them with others."""
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
        "draws_per_term": config.eval.noises_per_term,
        "matmul_precision": PRECISION,
        "network_dtype": str(getattr(experiment.training.network, "dtype", "float32")),
        "seed": config.seed,
    }


def save_curves(directory: Path, bounds: dict[str, Bound], protocol: dict, title: str, num_levels: int) -> None:
    """Writes bpd.npz with every curve's numbers and how they were measured, bpd.png and rate_distortion.png."""
    test, train = bounds["test"], bounds["train"]
    test_terms, train_terms = (of.terms_bpd.mean(axis=0) for of in (test, train))
    rate_bpd, rmse = test.progressive_coding()
    several = {} if test.terms_noise_stderr is None else {"test_terms_noise_stderr": test.terms_noise_stderr}
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
            **several,
        )
    plots.plot_bpd(directory / "bpd.png", test_terms, train_terms, test.prior_bpd.mean(), title)
    plots.plot_rate_distortion(directory / "rate_distortion.png", rate_bpd, rmse, num_levels, title)
