"""The working directory of a run: whose it is, whether it is finished, and what its last checkpoint holds."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from ml_collections import ConfigDict

from diffusion import config as config_lib
from diffusion import files, processes
from diffusion.build import Experiment
from diffusion.checkpoint import Checkpoints
from diffusion.state import TrainState

LOCK = "lock"  # holds the name of its owner; what counts is the lock on it, which ends with the process
# What a run or its evaluation writes, apart from the lock and config.json.
WRITTEN = (
    *("metrics.jsonl", "checkpoints", "tensorboard", "summary.json", "eval.json", "samples*.png", "samples.npz"),
    *("progressive.png", "loss.png", "*bpd.png", "*bpd.npz", "*rate_distortion.png"),
)


def check(config: ConfigDict, directory: Path) -> None:
    """Raises a ValueError if `directory` is another run's, with the keys that differ, or a run would overwrite files.

    What else lies in it, such as a scheduler's log, is no obstacle.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"--workdir={directory} is not a directory; take another --workdir")
    path = directory / "config.json"
    if path.exists():
        differing = config_lib.differing(config, _saved(path))
        if differing:
            raise ValueError(
                f"{directory} holds a run with another config ({'; '.join(differing)}); "
                "give those values again or take another --workdir"
            )
    elif directory.exists():
        names = sorted(item.name for item in directory.iterdir())
        if in_the_way := [name for name in names if any(fnmatch(name, pattern) for pattern in WRITTEN)]:
            raise ValueError(
                f"{directory} holds no run (no config.json), but {', '.join(in_the_way)}, which a run would overwrite; "
                "take another --workdir"
            )


def claim(config: ConfigDict, directory: Path) -> None:
    """Makes `directory` this run's by writing config.json. Raises what `check` raises."""
    check(config, directory)
    directory.mkdir(parents=True, exist_ok=True)
    files.write_text(directory / "config.json", config_lib.to_json(config))


@contextlib.contextmanager
def owned(config: ConfigDict, directory: Path) -> Iterator[Path]:
    """Claims `directory` and keeps other runs out of it; yields where to write.

    Of several processes the first one writes into `directory`, and the others into a folder that is thrown away.

    Raises:
        ValueError: another process, which the message names, runs here, or what `check` raises.
    """
    with contextlib.ExitStack() as stack:

        def own():
            stack.enter_context(_locked(directory))
            claim(config, directory)

        processes.on_first(own)
        yield directory if processes.is_first() else Path(stack.enter_context(tempfile.TemporaryDirectory()))


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise OSError(f"{directory} is on a file system that cannot lock files ({error})") from error
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise ValueError(
                f"{directory} is in use by {owner}; wait for it, stop it or take another --workdir"
            ) from error
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}", file=file)
        file.flush()
        yield


def _saved(path: Path) -> str:
    """What config.json says, if it is JSON."""
    text = path.read_text()
    try:
        if isinstance(json.loads(text), dict):
            return text
    except ValueError:
        pass
    raise ValueError(f"{path} is damaged: it is not the JSON of a config; restore it or take another --workdir")


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
    return config_lib.completed(ConfigDict(json.loads(_saved(path), object_hook=as_tuples))).lock()


def is_finished(directory: Path) -> bool:
    """Whether the run trained to its end and was scored."""
    return (directory / "summary.json").exists()


def restore(experiment: Experiment, directory: Path) -> TrainState:
    """The state in the latest checkpoint, for evaluation or sampling; without one, the weights of config.init_from.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: the checkpoint was trained with another config, or is not that of its network.
    """
    check(experiment.config, directory)

    def read() -> TrainState:
        with Checkpoints(directory / "checkpoints") as checkpoints:
            if experiment.config.init_from and checkpoints.latest_step() is None:
                claim(experiment.config, directory)
                return experiment.initial_state()
            return checkpoints.restore(None, like=experiment.abstract_state())

    return processes.from_first(processes.on_first(read) or experiment.initial_state())
