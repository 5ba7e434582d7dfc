"""The other likelihoods of eval.likelihood: measured alone with --mode=eval, and after the bound in training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.data.source import Splits
from diffusion.evaluation import images
from diffusion.evaluation.likelihoods import Likelihood
from diffusion.evaluation.limit import for_protocol
from diffusion.experiment import other_likelihood
from diffusion.experiment.build import Experiment
from diffusion.experiment.workdir import EmaState
from diffusion.model import Model
from diffusion.programs import scored
from diffusion.runtime import devices, files, processes


def score(
    likelihood: Likelihood,
    experiment: Experiment,
    directory: Path,
    model: Model,
    state: EmaState,
    splits: Splits,
    stop: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Measures a likelihood of the images whose bound would be scored. A stopped call resumes.

    Process 0 writes KIND.npz, the numbers of every image. The other arguments are those of `evaluate.score`.

    Returns:
        The entries of KIND.json; on process 0 alone, {} elsewhere.
    """
    config, about = experiment.config, scored.about(state, splits)
    model = for_protocol(model, config.eval.protocol) if likelihood.IS_OF_THE_CHAIN else model
    sources, numbers = scored.chosen_images(config, splits)
    digests = [state.sha256, about["data_sha256"], repr(likelihood)]
    kept = directory / scored.UNFINISHED / scored.key(config, model, digests, numbers)
    of_split = likelihood.of_split(config.seed, config.eval.batch_size, config.eval.protocol, stop)
    replicated = devices.replicate(model)
    found = {
        split: of_split(replicated, source, numbers[split], kept / f"{likelihood.KIND}_{split}.npy")
        for split, source in sources.items()
    }
    if not processes.is_first():
        return {}
    of_bound = scored.protocol_of(experiment, model.p.variance) | {"num_steps": model.schedule.num_steps}
    protocol = likelihood.about(of_bound)
    protocol |= {f"{split}_images": f"{len(numbers[split])} of {len(source)}" for split, source in sources.items()}
    arrays = {name: array for split in numbers for name, array in found[split].arrays(split).items()}
    arrays |= {f"{split}_numbers": of_split for split, of_split in numbers.items()}
    with files.replacing(directory / f"{likelihood.KIND}.npz") as file:
        np.savez_compressed(file, protocol=json.dumps(protocol), **arrays)
    scored.forget(kept)
    return {
        "step": about["step"],
        "num_params": about["num_params"],
        "protocol": protocol,
        **{name: value for split in numbers for name, value in found[split].summary(split).items()},
        **about,
    }


def after_bound(experiment: Experiment, *given: Any) -> dict[str, Any]:
    """The entries of summary.json about eval.likelihood, with other names than the bound's; {} if it is the bound.

    Args:
        given: the arguments of `score` after the experiment.
    """
    likelihood = other_likelihood.chosen(experiment.config)
    if likelihood is None or experiment.config.eval.num_images == images.NONE:
        return {}
    scores = score(likelihood, experiment, *given)
    own = {name: value for name, value in scores.items() if f"_{likelihood.KIND}_" in name}
    return own | ({f"{likelihood.KIND}_protocol": scores["protocol"]} if scores else {})
