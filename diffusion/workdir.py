"""The working directory of a run: whose it is, whether it is finished, and what its last checkpoint holds."""

import json
import os
from pathlib import Path

from ml_collections import ConfigDict

from diffusion import config as config_lib
from diffusion.build import Experiment
from diffusion.checkpoint import Checkpoints
from diffusion.state import TrainState

TEMPORARY = "config.json.tmp"  # all that a run killed at its very start leaves


def check(config: ConfigDict, directory: Path) -> None:
    """Raises a ValueError if `directory` is another run's, with the keys that differ, or holds what is no run."""
    path = directory / "config.json"
    if path.exists():
        differing = config_lib.differing(config, path.read_text())
        if differing:
            raise ValueError(
                f"{directory} holds a run with another config ({'; '.join(differing)}); "
                "give those values again or take another --workdir"
            )
    elif directory.exists() and {item.name for item in directory.iterdir()} - {TEMPORARY}:
        raise ValueError(f"{directory} is not empty and holds no run (no config.json); take another --workdir")


def claim(config: ConfigDict, directory: Path) -> None:
    """Makes `directory` this run's by writing config.json. Raises what `check` raises."""
    check(config, directory)
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / TEMPORARY
    temporary.write_text(config_lib.to_json(config))
    os.replace(temporary, directory / "config.json")


def read_config(directory: Path) -> ConfigDict:
    """The resolved config of the run in `directory`.

    Raises:
        FileNotFoundError: there is no run in it.
    """
    path = directory / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{directory} holds no run (no config.json)")
    # JSON knows lists only; in a config all of them are tuples.
    as_tuples = lambda group: {k: tuple(v) if isinstance(v, list) else v for k, v in group.items()}  # noqa: E731
    return ConfigDict(json.loads(path.read_text(), object_hook=as_tuples)).lock()


def is_finished(directory: Path) -> bool:
    """Whether the run trained to its end and was scored."""
    return (directory / "summary.json").exists()


def restore(experiment: Experiment, directory: Path) -> TrainState:
    """The state in the latest checkpoint, for evaluation or sampling; without one, the weights of config.init_from.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: the checkpoint was trained with another config.
    """
    check(experiment.config, directory)
    with Checkpoints(directory / "checkpoints") as checkpoints:
        if experiment.config.init_from and checkpoints.latest_step() is None:
            claim(experiment.config, directory)
            return experiment.initial_state()
        return checkpoints.restore(None, like=experiment.abstract_state())
