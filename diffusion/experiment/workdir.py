"""The working directory of a run: which run it belongs to, whether the run is finished, and its last checkpoint."""

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Collection, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from diffusion.experiment import build, export, kept_averages, named_run
from diffusion.experiment import config as config_lib
from diffusion.experiment.build import Experiment
from diffusion.experiment.ema import EmaState, ema_of, load_x0_variance
from diffusion.experiment.schema import all_keys
from diffusion.model import Model
from diffusion.reporting.summary import read_json
from diffusion.runtime import files, processes
from diffusion.runtime.checkpoint import Checkpoints, has_begun
from diffusion.runtime.digests import named_leaves

SUMMARY, SECONDS, START = "summary.json", "seconds.json", "start.json"
STOPPED_EARLY = "stopped_early"  # in summary.json: why training stopped before its last step
BASE = "base.json"  # the name and the values of the config file that the run started from
ADVICE = "wait for it, stop it or take another --workdir"  # if another process runs there
# The files of a run and its evaluation, apart from the lock and config.json.
WRITTEN = (
    *("metrics.jsonl", "checkpoints", "loss.png", "schedule.png", "x0_variance.npz"),
    *("summary*.json", SECONDS, "tensorboard", "wandb", "wandb.json"),
    *("samples", "samples*.png", "samples.npz", "progressive.png"),
    *("quality.json", "unfinished_quality", "importance.json", "importance.npz", "ode.json", "ode.npz"),
    *("evaluations", "unfinished_eval", "eval.json", "bpd.npz", "bpd.png", "rate_distortion.png"),
    *(BASE, START, "fork.json", "report.html", kept_averages.FOLDER),
)


def parse(text: str, flag: str = "--workdir") -> Path:
    """The directory that a flag names. Raises a ValueError for a URL or None, which would become a local folder."""
    if text == "None":
        raise ValueError(f"{flag}=None names no directory; ./None is a folder of that name")
    if "://" in text:
        raise ValueError(f"{flag}={text} is not a local directory; remote paths are not read")
    return files.expanded(text)


def check(config: ConfigDict, directory: Path) -> None:
    """Raises a ValueError if `directory` holds another run, with the differing keys, or if files would be overwritten.

    Other files, such as a scheduler's log, are allowed.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"--workdir={directory} is not a directory; take another --workdir")
    if export.is_export(directory):
        start = f"--config.init_from={directory}"
        raise ValueError(f"--workdir={directory} is an export, not a run; take another --workdir, with {start}")
    if (directory / "config.json").exists():
        differing = config_lib.differing(config, read_config(directory))
        if differing:
            raise ValueError(
                f"{directory} holds a run with another config ({'; '.join(differing)}); "
                "give those values again or take another --workdir (--fork continues this run with other values)"
            )
    elif directory.exists():
        names = sorted(item.name for item in directory.iterdir())
        if in_the_way := [name for name in names if any(fnmatch(name, pattern) for pattern in WRITTEN)]:
            raise ValueError(
                f"{directory} holds no run (no config.json), but {', '.join(in_the_way)}, which a run would overwrite; "
                "take another --workdir"
            )


def continued(config: ConfigDict, directory: Path, chosen: Collection[str] = ()) -> ConfigDict:
    """The config, with the values that the run in `directory` implies for keys that did not exist when it began.

    So a config file may set a new key, and earlier runs of this file can still resume.

    Args:
        chosen: the keys that the user set. They keep their values.
    """
    path = directory / "config.json"
    if not path.exists():
        return config
    given, known = config_lib.flatten(config), all_keys()
    lacking = config_lib.lacking(path) & given.keys() - set(chosen)
    then = {name: known[name].when_absent for name in sorted(lacking) if known[name].free is not True}
    for name, value in then.items():
        if value != given[name]:
            logging.warning("%s began before the key %s existed and continues with %s=%s", directory, name, name, value)
    return ConfigDict(unflatten_dict(given | then, sep=".")).lock()


def claim(config: ConfigDict, directory: Path) -> None:
    """Claims `directory` for this run by writing config.json. Raises the errors of `check`.

    A key that did not exist when the run began stays out of config.json while its value is the behaviour of that time.
    If a finished run continues, its summary.json becomes summary_STEP.json.
    """
    check(config, directory)
    directory.mkdir(parents=True, exist_ok=True)
    summary = directory / SUMMARY
    if (found := read_json(summary)) is not None and not is_finished(directory, config):
        step = found.get("step", read_config(directory).train.num_steps)
        os.replace(summary, summary.with_stem(f"summary_{step}"))
    path = directory / "config.json"
    lacking = config_lib.lacking(path) if path.exists() else set()
    files.write_text(path, config_lib.to_json(config, lacking))


def save_base(directory: Path, path: str) -> None:
    """Saves the path in --config and the values of the config file, because the file may change later."""
    values = config_lib.from_file(path, {}).to_dict()
    text = json.dumps({"config": path, "values": values}, indent=2, sort_keys=True)
    files.write_text(directory / BASE, text + "\n")


@contextlib.contextmanager
def owned(config: ConfigDict, directory: Path) -> Iterator[Path]:
    """Claims `directory`, keeps other runs out of it, and yields the folder to write into.

    In a multi-process run, process 0 writes into `directory`. The others write into a temporary folder.

    Raises:
        ValueError: another process, named in the message, runs here, or an error of `check`.
    """
    with locked(directory), contextlib.ExitStack() as stack:
        processes.on_first(lambda: claim(config, directory))
        yield directory if processes.is_first() else Path(stack.enter_context(tempfile.TemporaryDirectory()))


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Makes `directory` and keeps other runs out of it. In a multi-process run process 0 holds the lock.

    Raises:
        ValueError: another process, named in the message, runs there.
    """
    with contextlib.ExitStack() as stack:
        processes.on_first(lambda: stack.enter_context(files.locked(directory, ADVICE)))
        yield


def read_config(directory: Path) -> ConfigDict:
    """The resolved config of the run in `directory`.

    Raises:
        FileNotFoundError: there is no run in it.
        ValueError: its config.json is damaged, or was written by a version with other keys.
    """
    path = directory / "config.json"
    if not path.exists():
        start = f", but an export; --config.init_from={directory} starts from it"
        raise FileNotFoundError(
            f"{directory} holds no run (no config.json){start if export.is_export(directory) else ''}"
        )
    return config_lib.read(path)


def is_finished(directory: Path, config: ConfigDict | None = None) -> bool:
    """Whether the run trained to its end and was scored. With a config, the end is the one that it sets."""
    found = read_json(directory / SUMMARY)
    if found is None:  # a damaged one is written again
        return False
    if config is not None and STOPPED_EARLY in found:
        return 0 < config.train.patience <= found[STOPPED_EARLY]["validations"]
    return config is None or config.train.num_steps == read_config(directory).train.num_steps


def restore(experiment: Experiment, directory: Path, checkpoint: str = "latest", claims: bool = True) -> EmaState:
    """The EMA in a checkpoint, for evaluation or sampling. Before a run's first one, "latest" is config.init_from.

    Args:
        checkpoint: "latest"; "best", the kept one with the lowest val_loss; or a step.
        claims: whether `directory` becomes the run of these weights. Otherwise nothing is written.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: `checkpoint` is none of these, or its checkpoint has another config or network.
    """
    if checkpoint not in ("latest", "best") and not checkpoint.isdecimal():
        raise ValueError(f"--checkpoint={checkpoint} must be latest, best or the step of a checkpoint")
    check(experiment.config, directory)

    def read() -> EmaState:
        with Checkpoints(directory / "checkpoints") as checkpoints:
            of_start = checkpoint in ("latest", "0")  # another checkpoint is one of a run
            if experiment.config.init_from and of_start and not has_begun(directory / "checkpoints"):
                if experiment.config.ema.length:
                    raise ValueError(f"ema.length={experiment.config.ema.length:g} needs a run; init_from is no run")
                start = ema_of(experiment.initial_state())
                if claims and not (directory / "config.json").exists():
                    claim(experiment.config, directory)
                return start
            step = int(checkpoint) if checkpoint.isdecimal() else None
            if checkpoint == "best":
                step = checkpoints.best_step()
            return kept_averages.read(checkpoints, step, ema_of(experiment.abstract_state()), experiment.config.ema)

    like = ema_of(experiment.abstract_state())
    empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)  # to receive the values from process 0
    return processes.from_first(processes.on_first(read) or empty)


class LoadedRun(NamedTuple):
    """A trained run or an export: its config as objects, the EMA of a checkpoint, and its path."""

    experiment: Experiment
    state: EmaState
    directory: Path

    def __repr__(self) -> str:
        return f"LoadedRun({str(self.directory)!r}, step {int(self.state.step)}, {self.model})"

    @property
    def config(self) -> ConfigDict:
        return self.experiment.config

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.experiment.image_shape

    @property
    def model(self) -> Model:
        """The model of the EMA parameters, with the variance of training."""
        return self.experiment.model(self.state.ema_params)

    def model_with(self, variance: str) -> Model:
        """The model with another variance, as `Experiment.model` takes it. Raises the errors of `load_x0_variance`."""
        x0_variance = load_x0_variance(self.directory, self.state) if variance == "optimal" else None
        return self.experiment.model(self.state.ema_params, variance, x0_variance)

    def export(self, directory: str | Path, license: str = "") -> None:
        """Writes the model as two files. `load` and `init_from` take them without the run and its data set.

        Args:
            directory: a directory without another export.
            license: the license of the parameters, for their users; the program does not read it.

        Raises:
            ValueError: `directory` holds something else, or this is an export already.
            OSError: a file could not be written.
        """
        if export.is_export(self.directory):
            raise ValueError(f"{self.directory} is an export already; copy its files")
        step, network = int(self.state.step), self.experiment.training.network
        num_classes = network.num_classes if self.experiment.training.conditional else 0
        num_levels, sha256 = self.experiment.training.num_levels, self.state.sha256
        about = export.Export(self.config, self.image_shape, num_levels, num_classes, step, sha256)
        with Checkpoints(self.directory / "checkpoints") as checkpoints:
            data_sha256 = checkpoints.trained_on(step)
        facts = {"license": license, "command": export.command_in(self.directory, self.config)}
        facts |= {"data_sha256": data_sha256, "scores": export.scores_in(self.directory, sha256)}
        export.write(Path(directory), about, dict(named_leaves(self.state.ema_params)), facts)


def load(
    directory: str | Path, checkpoint: str = "latest", config: ConfigDict | None = None, claims: bool = True
) -> LoadedRun:
    """The run or the export in `directory`, to sample from it, score it or study it.

    An export does not need its data set.

    Args:
        directory: DIR, DIR@best or DIR@STEP.
        checkpoint, claims: see `restore`.
        config: for a run, a config that differs from its own only in keys that may change; None for its own.

    Raises:
        FileNotFoundError: there is no run or export, no checkpoint, or the run's data set is missing.
        ValueError: the config or the checkpoint is damaged.
    """
    if checkpoint == "latest":
        directory, checkpoint = named_run.parse(str(directory), "directory")
    directory = Path(directory)
    if config is None and export.is_export(directory):
        return _exported(directory, checkpoint)
    config = read_config(directory) if config is None else config
    described = build.describe_data(config)
    experiment = build.experiment(config, described.image_shape, described.num_levels, described.num_classes)
    return LoadedRun(experiment, restore(experiment, directory, checkpoint, claims), directory)


def _exported(directory: Path, checkpoint: str) -> LoadedRun:
    about = export.read(directory)
    if checkpoint not in ("latest", str(about.step)):
        raise ValueError(f"{directory} is an export of step {about.step} only; there is no checkpoint {checkpoint}")
    try:
        experiment = build.experiment(about.config, about.image_shape, about.num_levels, about.num_classes)
    except ValueError as error:
        raise ValueError(f"{directory / export.ABOUT}: {error}") from error
    shapes = {name: leaf.shape for name, leaf in named_leaves(experiment.abstract_state().ema_params)}
    params = export.read_params(directory, about, shapes)
    return LoadedRun(experiment, EmaState(np.int32(about.step), unflatten_dict(params, sep="/")), directory)
