"""--fork: a new run that goes on from a checkpoint of another one, optimizer state included, with other keys.

What a run may not change, a fork may: it is another run, and fork.json says where it comes from.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from diffusion.experiment import workdir
from diffusion.experiment.build import Experiment
from diffusion.reporting.metrics_log import read_metrics
from diffusion.runtime import files
from diffusion.runtime.checkpoint import Checkpoints
from diffusion.runtime.digests import tree_sha256
from diffusion.training.step import TrainState

NAME = "fork.json"  # in the new run: where it comes from


class Fork(NamedTuple):
    """A state to go on from, on the host, and where it comes from."""

    state: TrainState
    origin: dict[str, Any]  # what fork.json holds
    rows: list[dict[str, Any]]  # of metrics.jsonl, up to the state's step


def parse(text: str) -> tuple[Path, str]:
    """ "DIR@STEP" -> the run's directory, and which checkpoint: "latest" without @, "best" or a step.

    Raises:
        ValueError: what comes after the @ is none of these.
    """
    directory, _, which = text.partition("@")
    if which not in ("", "latest", "best") and not which.isdecimal():
        raise ValueError(f"--fork={text}: after the @ comes latest, best or the step of a checkpoint")
    return Path(directory).expanduser(), which or "latest"


def read(experiment: Experiment, text: str, directory: Path) -> Fork | None:
    """What `text` names; None if `directory` is a fork of it that has a checkpoint. Nothing is written.

    Raises:
        FileNotFoundError: there is no such run or checkpoint.
        ValueError: `directory` is another run's, or the checkpoint does not fit the config.
    """
    source, which = parse(text)
    known = origin_of(directory)
    with Checkpoints(directory / "checkpoints") as checkpoints:
        began = checkpoints.latest_step() is not None
    if began:
        asked = {"directory": str(source.resolve())} | ({"step": int(which)} if which.isdecimal() else {})
        if not known or asked.items() - known.items():
            comes_from = f"comes from {known['directory']}@{known['step']}" if known else "is no fork"
            raise ValueError(f"--fork={text}: {directory} holds a run that {comes_from}; take another --workdir")
        return None
    workdir.read_config(source)  # or there is no run
    with Checkpoints(source / "checkpoints") as checkpoints:
        step = int(which) if which.isdecimal() else checkpoints.best_step() if which == "best" else None
        state = checkpoints.restore(step, experiment.abstract_state())
    origin = {"directory": str(source.resolve()), "step": int(state.step), "ema_sha256": tree_sha256(state.ema_params)}
    return Fork(state, origin, [row for row in read_metrics(source) if row["step"] <= state.step])


def write(fork: Fork, directory: Path, data_sha256: dict[str, str]) -> None:
    """Puts the state into `directory`, which is the new run's: from there its training resumes.

    The checkpoint comes last: a call that is killed before is repeated.
    """
    files.write_text(directory / NAME, json.dumps(fork.origin, indent=2) + "\n")
    files.write_text(directory / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in fork.rows))
    with Checkpoints(directory / "checkpoints", data_sha256=data_sha256) as checkpoints:
        checkpoints.save(int(fork.state.step), fork.state, {})


def origin_of(directory: Path) -> dict[str, Any]:
    """What fork.json of a run holds; {} for a run that is no fork."""
    path = directory / NAME
    return json.loads(path.read_text()) if path.exists() else {}
