"""The averages that a run with ema.post_hoc saves beside its checkpoints, and averages composed of these.

ema_averages/STEP.safetensors holds the two averages of a regular checkpoint, with their digest. They are never deleted.
`post_hoc_ema` explains their use.
"""

import logging
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from diffusion import post_hoc_ema
from diffusion.experiment.ema import EmaState
from diffusion.runtime import files
from diffusion.runtime.checkpoint import Checkpoints
from diffusion.runtime.digests import named_leaves, tree_sha256

FOLDER = "ema_averages"  # in the run's directory
ENTRY = "power_ema"  # of a checkpoint
LARGEST_MISFIT = 0.1  # of the weights per step; what is above it is said
ADVICE = "without the file the average is composed of the others"


class AveragesKept(Checkpoints):
    """Checkpoints of a run that also saves the averages of every `every`-th step.

    The averages are written before the checkpoint, so a killed and resumed run has those of every earlier step. A save
    at another step, on a signal, writes no averages. So a run that was stopped has the same files as one that was not.
    """

    def __init__(self, directory: Path, every: int, **settings):
        super().__init__(directory, **settings)
        self._every = every

    def save(self, step: int, state: PyTree, metrics: dict) -> None:
        if state.power_ema and step % self._every == 0:
            write(self.directory.parent / FOLDER, step, state.power_ema)
        super().save(step, state, metrics)


def check_training(config: ConfigDict) -> None:
    """Raises a ValueError if another average would be scored at the end of training."""
    if config.ema.length:
        raise ValueError(
            f"ema.length={config.ema.length} is composed after training, which ends with the average of ema.decay; use "
            "it in --mode=eval, sample, quality, compress or export"
        )


def write(folder: Path, step: int, averages: PyTree) -> None:
    """Writes the averages of a step. Raises an OSError that names the file if it cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.asarray(leaf, order="C") for name, leaf in named_leaves(averages)}
    with files.replacing(folder / f"{step}.safetensors") as file:
        file.write(save(tensors, {"sha256": tree_sha256(tensors)}))


def read(checkpoints: Checkpoints, step: int | None, like: EmaState, ema: ConfigDict) -> EmaState:
    """The average of ema.length at a checkpoint, composed of the averages saved up to it. For 0, the average of
    ema.decay.

    Args:
        step, like: as `Checkpoints.restore` takes them.
        ema: the config group.

    Raises:
        ValueError: a saved average is damaged, or an error of `Checkpoints.restore`.
    """
    found = checkpoints.restore(step, like)
    if not ema.length:
        return found
    step, folder = int(found.step), checkpoints.directory.parent / FOLDER
    steps = [*(one for one in kept_steps(folder) if one < step), step]
    kept = np.repeat(steps, 2), np.tile(ema.post_hoc, len(steps))
    factors = post_hoc_ema.coefficients(*kept, step, ema.length)
    error = post_hoc_ema.misfit(factors, *kept, step, ema.length)
    if error > LARGEST_MISFIT:
        logging.warning(
            "ema.length=%s: the weights composed of %d kept steps are %.0f%% away from that length's; more steps "
            "are kept with a smaller train.checkpoint_every",
            ema.length,
            len(steps),
            100 * error,
        )
    names = [name for name, _ in named_leaves(like.ema_params)]
    total = {name: np.zeros((), np.float64) for name in names}
    for one, of_step in zip(steps, factors.reshape(-1, 2), strict=True):
        averages = checkpoints.entry(step, ENTRY) if one == step else _read(folder / f"{one}.safetensors")
        for number, factor in enumerate(of_step):
            total = {name: total[name] + factor * averages[f"{number}/{name}"] for name in names}
    leaves = [total[name].astype(np.float32) for name in names]
    return EmaState(found.step, jax.tree.unflatten(jax.tree.structure(like.ema_params), leaves))


def kept_steps(folder: Path) -> list[int]:
    """The steps whose averages were saved, in order."""
    return sorted(int(path.stem) for path in folder.glob("*.safetensors") if path.stem.isdecimal())


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="numpy") as file:
            averages = {name: file.get_tensor(name) for name in file.keys()}
            is_sound = (file.metadata() or {}).get("sha256") == tree_sha256(averages)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); {ADVICE}") from error
    if not is_sound:
        raise ValueError(f"{path} is damaged: its content does not match its SHA-256; {ADVICE}")
    return averages
