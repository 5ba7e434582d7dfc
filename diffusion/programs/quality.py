"""--mode=quality: samples of a trained model against the training split, by every metric of `evaluation.quality`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from diffusion.data import Source
from diffusion.evaluation import quality
from diffusion.experiment import build, memory
from diffusion.programs import sample
from diffusion.reporting import page, summary
from diffusion.runtime import processes
from diffusion.runtime.digests import tree_sha256
from diffusion.runtime.preemption import Preemption

USUAL_IMAGES = 50_000  # of published Fréchet distances


def run(config: ConfigDict, directory: Path, checkpoint: str = "latest") -> None:
    """Draws from a checkpoint of `directory`, writes quality.json and prints it."""
    experiment, state, model = sample.trained(config, directory, checkpoint)
    train_set, test_set = (build.load_data(config, split) for split in ("train", "test"))
    with Preemption(), memory.explained(experiment, "sample.batch_size"):
        images = sample.Sampler(experiment).images(model, config.quality.num_images)
    scores = score(config, images, train_set, test_set) | {
        "sampler": {
            "method": config.sample.method,
            "num_steps": config.sample.num_steps or config.schedule.num_steps,
            "variance": model.p.variance,
            "seed": config.seed,
        },
        "step": int(state.step),
        "ema_sha256": tree_sha256(state.ema_params),
        "device": summary.device_name(),
        "versions": summary.versions(),
    }
    if processes.is_first():
        summary.write_json(directory / "quality.json", scores)
        page.refresh(directory)
        print(json.dumps(scores, indent=2, ensure_ascii=False))


def score(
    config: ConfigDict, images: UInt8[np.ndarray, "n h w c"], train_set: Source, test_set: Source
) -> dict[str, Any]:
    """Every metric of the samples, and for scale of the test split, against all of the training split.

    Returns:
        The entries of quality.json that say what was compared, and the numbers.
    """
    features, num_levels = build.quality_features(config), train_set.num_levels
    compared = (images, train_set.images(), test_set.images())
    samples, train, test = (quality.states(side, num_levels, features) for side in compared)
    scores = quality.results(samples, train)
    scores |= {f"{name}_test_split": value for name, value in quality.results(test, train).items()}
    scores |= {
        "num_samples": len(images),
        "features": config.quality.features,
        "reference": f"{train_set.name}, train split, {len(train_set)} images",
    }
    if len(images) < USUAL_IMAGES:
        scores["note"] = (
            f"the Fréchet distance of few images is biased upwards: that of {len(images)} samples compares only with "
            f"others of {len(images)}; the test split has {len(test_set)} images"
        )
    return scores
