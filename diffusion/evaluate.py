"""Scoring a trained model: the variational bound of every image of a split, term by term, in bits/dim."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, PyTree, UInt8
from ml_collections import ConfigDict

from diffusion import build, data, likelihood, parallel, randomness, report, workdir
from diffusion.build import Experiment
from diffusion.checkpoint import tree_sha256
from diffusion.data import ImageSet
from diffusion.state import TrainState
from diffusion.step import to_unit


@dataclasses.dataclass(frozen=True)
class Bound:
    """The bound of N images, in bits/dim: terms_bpd[n, t − 1] is image n's term of t, prior_bpd[n] its L_T."""

    terms_bpd: Float[np.ndarray, "n t"]
    prior_bpd: Float[np.ndarray, " n"]

    @property
    def image_bpd(self) -> Float[np.ndarray, " n"]:
        """Each image's whole bound."""
        return self.terms_bpd.sum(axis=1) + self.prior_bpd

    def summary(self, split: str) -> dict[str, Any]:
        """The mean over images with its standard error, and its three parts."""
        total = self.image_bpd
        return {
            f"{split}_bpd": total.mean(),
            # Of one image there is no spread to estimate the error from.
            f"{split}_bpd_stderr": total.std(ddof=1) / len(total) ** 0.5 if len(total) > 1 else None,
            f"{split}_decoder_bpd": self.terms_bpd[:, 0].mean(),
            f"{split}_kl_bpd": self.terms_bpd[:, 1:].sum(axis=1).mean(),
            f"{split}_images": len(total),
        }


def run(config: ConfigDict, directory: Path) -> None:
    """--mode=eval: scores the latest checkpoint of `directory`."""
    train_set, test_set = (data.load(config.data.name, split, config.data.data_dir) for split in ("train", "test"))
    experiment = build.experiment(config, test_set.images.shape[1:], test_set.num_levels)
    summary = score(experiment, directory, workdir.restore(experiment, directory), train_set, test_set)
    print(json.dumps(summary, indent=2))


def score(
    experiment: Experiment, directory: Path, state: TrainState, train_set: ImageSet, test_set: ImageSet
) -> dict[str, Any]:
    """Scores the EMA parameters on the test split and on as many training images; writes bpd.npz and bpd.png.

    Returns:
        The entries of summary.json that say what was scored and how well.
    """
    bound = bound_of(experiment)
    params = parallel.replicate(state.ema_params)
    wanted = experiment.config.eval.num_images
    if wanted > len(test_set.images):
        raise ValueError(f"eval.num_images={wanted} exceeds the {len(test_set.images)} images of the test split")
    num_images = wanted or len(test_set.images)
    test = bound(params, subset(test_set.images, num_images), "test")
    train = bound(params, subset(train_set.images, min(num_images, len(train_set.images))), "train")

    test_terms = test.terms_bpd.mean(axis=0)
    np.savez_compressed(
        directory / "bpd.npz",
        test_terms_bpd=test_terms,
        train_terms_bpd=train.terms_bpd.mean(axis=0),
        test_image_bpd=test.image_bpd,
        train_image_bpd=train.image_bpd,
    )
    title = f"{test_set.name}, {num_images} test images"
    report.plot_bpd(directory / "bpd.png", test_terms, test.prior_bpd.mean(), title)
    return {
        "step": int(state.step),
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        **test.summary("test"),
        **train.summary("train"),
        "prior_bpd": test.prior_bpd.mean(),
        "params_sha256": tree_sha256(state.params),
        "ema_sha256": tree_sha256(state.ema_params),
    }


def subset(images: UInt8[np.ndarray, "n h w c"], num_images: int) -> UInt8[np.ndarray, "m h w c"]:
    """A fixed random choice of the images. (The first ones of a set that is sorted by class are one class.)"""
    chosen = np.random.RandomState(0).permutation(len(images))[:num_images]
    return images[np.sort(chosen)]


def bound_of(experiment: Experiment) -> Callable[[PyTree, np.ndarray, str], Bound]:
    """The bound as a function of (replicated parameters, images uint8 [N, H, W, C], name), compiled once.

    Every image is scored exactly once: the last batch is padded and the padding dropped. x̂_0 is clipped.
    """
    schedule, num_levels = experiment.schedule, experiment.num_levels
    seed_key = randomness.stream(experiment.config.seed, "eval")

    def one_batch(params, images, image_numbers):
        x0 = to_unit(images, num_levels)
        keys = randomness.per_item(seed_key, image_numbers)
        denoise = experiment.denoiser(params)
        terms = likelihood.vlb_terms_bpd(denoise, experiment.p, schedule, x0, keys, num_levels)
        return terms, jax.vmap(lambda image: likelihood.prior_bpd(schedule, image))(x0)

    compiled = parallel.over_devices(one_batch)

    def bound(replicated_params: PyTree, images: UInt8[np.ndarray, "n h w c"], name: str) -> Bound:
        results = []
        with report.Progress(len(images), desc=f"score {name}", unit="image") as progress:
            for numbers, num_real in parallel.padded_batches(len(images), experiment.config.eval.batch_size):
                batch = compiled(replicated_params, images[numbers], numbers)
                results.append([parallel.gather(array, num_real) for array in batch])
                progress.update(num_real)
        terms, prior = (np.concatenate(parts).astype(np.float64) for parts in zip(*results, strict=True))
        return Bound(terms, prior)

    return bound
