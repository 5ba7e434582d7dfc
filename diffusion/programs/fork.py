"""--fork: a new run that continues from a checkpoint of another run, optimizer state included, with other keys.

A fork may change keys that a run may not, because it is another run. fork.json records its origin.
"""

import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion.experiment import named_run, workdir
from diffusion.experiment.build import Experiment
from diffusion.reporting import summary
from diffusion.reporting.metrics_log import read_metrics
from diffusion.runtime import files
from diffusion.runtime.checkpoint import Checkpoints, has_begun
from diffusion.runtime.digests import tree_sha256
from diffusion.runtime.verification import OtherCheckpoint
from diffusion.training.step import TrainState

NAME = "fork.json"  # in the new run: where it comes from


class Fork(NamedTuple):
    """A state to continue from, on the host, and its origin."""

    state: TrainState
    origin: dict[str, Any]  # what fork.json holds
    rows: list[dict[str, Any]]  # of metrics.jsonl, up to the state's step


def check_target(text: str, directory: Path) -> None:
    """Raises a ValueError if `directory` holds a run that is not a fork of the run that `text` names."""
    if not has_begun(directory / "checkpoints"):
        return
    source, known = named_run.parse(text, "--fork"), origin_of(directory)
    asked = {"directory": str(source.directory.resolve())}
    asked |= {"step": int(source.which)} if source.which.isdecimal() else {}
    if not known or asked.items() - known.items():
        comes_from = f"comes from {known['directory']}@{known['step']}" if known else "is no fork"
        raise ValueError(f"--fork={text}: {directory} holds a run that {comes_from}; take another --workdir")


def read(experiment: Experiment, text: str, directory: Path) -> Fork | None:
    """The run that `text` names; None if `directory` is a fork of it with a checkpoint. Nothing is written.

    Raises:
        FileNotFoundError: there is no such run or checkpoint.
        ValueError: `directory` is another run's, or the checkpoint does not fit the config.
    """
    check_target(text, directory)
    if has_begun(directory / "checkpoints"):
        return None
    source = named_run.parse(text, "--fork")
    old, new = workdir.read_config(source.directory), experiment.config
    named_run.warn_of_seen_images(f"--fork={text}", new.data.validation, old.data.validation)
    if old.ema.post_hoc and new.ema.post_hoc and new.ema.post_hoc != old.ema.post_hoc:
        raise ValueError(
            f"--fork={text} holds averages of the lengths ema.post_hoc={tuple(old.ema.post_hoc)}, "
            f"which go on in a fork; the config has {tuple(new.ema.post_hoc)}"
        )
    try:
        with Checkpoints(source.checkpoints) as checkpoints:
            state = _restored(checkpoints, source.step(checkpoints), experiment)
    except OtherCheckpoint as error:
        instead = f"--config.init_from={text} --config.init_adapt=True begins a new run with the parameters that fit"
        raise ValueError(f"{error}; a fork keeps network and optimizer; without --fork, {instead}") from error
    if state.step >= new.train.num_steps:
        raise ValueError(
            f"--fork={text} is at step {state.step}, so train.num_steps={new.train.num_steps} leaves nothing to train; "
            "it counts from the beginning of the old run"
        )
    origin = {"directory": str(source.directory.resolve()), "step": int(state.step)}
    origin |= {"ema_sha256": tree_sha256(state.ema_params)}
    return Fork(state, origin, [row for row in read_metrics(source.directory) if row["step"] <= state.step])


def _restored(checkpoints: Checkpoints, step: int | None, experiment: Experiment) -> TrainState:
    """The state of a checkpoint. What belongs to another objective or another draw of t begins anew in it.

    Those are the sums of the metrics since the last row, the count of skipped updates, and what the draw remembers.
    """
    like = experiment.abstract_state()
    with contextlib.suppress(OtherCheckpoint):
        return checkpoints.restore(step, like)
    state = checkpoints.restore(step, like.replace(window={}, timesteps=()))
    window = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in like.window.items()}
    memory = experiment.training.timesteps.init(experiment.config.schedule.num_steps)
    return state.replace(window=window, timesteps=jax.device_get(memory))


def write(fork: Fork, directory: Path, data_sha256: dict[str, str]) -> None:
    """Writes the state into `directory`, the new run's. Its training resumes from there.

    The checkpoint is written last, so a call that is killed earlier is repeated. Nothing is written if another process
    has made this fork since `read`.
    """
    if has_begun(directory / "checkpoints"):
        return
    files.write_text(directory / NAME, json.dumps(fork.origin, indent=2) + "\n")
    files.write_text(directory / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in fork.rows))
    with Checkpoints(directory / "checkpoints", data_sha256=data_sha256) as checkpoints:
        checkpoints.save(int(fork.state.step), fork.state, {})


def check_made(directory: Path) -> None:
    """Raises a ValueError if a fork was killed before its first state was written."""
    if (known := origin_of(directory)) and not has_begun(directory / "checkpoints"):
        again = f"--fork={known['directory']}@{known['step']}"
        raise ValueError(f"{directory} is a fork that was stopped before its first checkpoint; give {again} again")


def origin_of(directory: Path) -> dict[str, Any]:
    """The contents of a run's fork.json; {} for a run that is not a fork. Raises a ValueError if it is damaged."""
    path = directory / NAME
    found = summary.read_json(path)
    if found is None and path.exists():
        raise ValueError(f"{path} is damaged, which says where this run comes from; restore it")
    return found or {}
