"""Checkpoints: the only file that names Orbax.

A checkpoint is a nested dict of host arrays, named as the leaves of the training state are
(`params/conv_in/kernel`), so it can be read without this project's classes, and the SHA-256 digest of every leaf:
Orbax restores a file with a flipped bit without a word.
"""

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, SupportsFloat

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers

from diffusion.runtime.digests import leaf_sha256, named_leaves

# Orbax reports every phase of every save through absl's logger; failures reach the caller as exceptions.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)

DAMAGED = "damaged"  # where `resume` moves what cannot be used; nothing is ever deleted from it


class DamagedCheckpoint(ValueError):
    """What is stored is not what was saved."""


class Checkpoints:
    """The checkpoints of one run: the last few, and the best.

    Nothing is written before the first `save`. As a context manager it waits for the save in progress.

    Args:
        directory: holds one directory per saved step.
        keep: how many of the latest checkpoints to keep; the one with the lowest `metric` is kept besides.
        metric: the entry of `save`'s metrics that ranks checkpoints.
    """

    def __init__(self, directory: str | Path, keep: int = 3, metric: str = "test_loss"):
        if keep < 1:
            raise ValueError(f"cannot keep the last {keep} checkpoints: at least 1 is needed to resume")
        self.directory = Path(directory).absolute()
        self._metric = metric
        self._last_saved: int | None = None
        # Orbax keeps what sorts last in descending order; a checkpoint that was not scored comes first.
        best = checkpoint_managers.BestN(get_metric_fn=self._score, reverse=True, n=1)
        last = checkpoint_managers.LatestN(keep)
        # The process that calls is the only one: what the others hold is the same, and none waits for them.
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"{me}"
        )
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                create=False,
                step_name_format=_CompleteSteps(),
                preservation_policy=checkpoint_managers.AnyPreservationPolicy([last, best]),
                best_fn=self._score,
                best_mode="min",
                multiprocessing_options=alone if jax.process_count() > 1 else ocp.options.MultiprocessingOptions(),
            ),
        )

    def save(self, step: int, state: PyTree, metrics: dict[str, SupportsFloat]) -> None:
        """Starts writing a checkpoint and returns once the state is copied.

        The checkpoint appears under its final name when it is complete. A step that is already saved is left
        as it is. Errors of the previous save (a full disk) are raised here or by `wait`.
        """
        if step in self._manager.all_steps():
            return
        if (self.directory / str(step)).exists():
            self._move_aside(self.directory / str(step))  # Orbax would overwrite what is left of a damaged one
        # Orbax copies NumPy arrays before it goes asynchronous; the next step may reuse the state's buffers.
        host = {tuple(path.split("/")): np.asarray(leaf) for path, leaf in named_leaves(state)}
        scores = {name: float(value) for name, value in metrics.items()}
        digests = {"step": step, "metrics": scores, "sha256": leaf_sha256(state)}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(traverse_util.unflatten_dict(host)), digests=ocp.args.JsonSave(digests)
        )
        self.wait()
        self._last_saved = step
        with self._named_failure():
            # Forced, because Orbax would skip a step below the latest one without a word.
            self._manager.save(step, args=items, metrics=scores, force=True)

    def latest_step(self) -> int | None:
        """The step of the newest sound checkpoint; None if there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step of the sound checkpoint with the lowest metric, the later of equals; None if unscored."""
        self.wait()
        metrics = {step: self._manager.metrics(step) for step in self._manager.all_steps()}
        scores = {step: row[self._metric] for step, row in metrics.items() if self._metric in row}
        return min(scores, key=lambda step: (scores[step], -step), default=None)

    def resume(self, like: PyTree) -> PyTree | None:
        """The newest sound checkpoint as `restore` returns it; None if there is none.

        Every damaged checkpoint met on the way, and every save that was broken off, is named in a warning and moved
        into damaged/. So this is for the run that owns the directory; what only reads takes `restore`.

        Raises:
            ValueError: the checkpoint does not fit `like`.
        """
        self.wait()
        for path in sorted(self.directory.iterdir()) if self.directory.exists() else []:
            if ".orbax-checkpoint-tmp" in path.name or path.name.isdecimal() and not _is_complete(path):
                logging.warning("the checkpoint %s is incomplete; moved to %s", path, self._move_aside(path))
        self._manager.reload()
        return self._newest(like, move_damaged=True)

    def restore(self, step: int | None, like: PyTree) -> PyTree:
        """Reads one checkpoint and verifies it.

        Args:
            step: which one; None is the newest sound one, after a warning about each damaged one passed over.
            like: a tree of the wanted structure whose leaves have a shape and a dtype (arrays or the structs
                of `jax.eval_shape`).

        Returns:
            A tree of the structure of `like` with NumPy arrays, bit-identical to what was saved.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            DamagedCheckpoint: it is damaged; the message names the first leaf that is not what was saved.
            ValueError: it does not fit `like`; the message names the first leaf that differs.
        """
        self.wait()
        steps = sorted(self._manager.all_steps())
        state = self._newest(like, move_damaged=False) if step is None else None
        if state is None and step not in steps:
            wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise FileNotFoundError(f"there is {wanted} in {self.directory} (sound ones: {steps or 'none'})")
        return self._read_as(step, like) if state is None else state

    def _newest(self, like: PyTree, move_damaged: bool) -> PyTree | None:
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return self._read_as(step, like)
            except DamagedCheckpoint as error:
                fate = f"moved to {self._move_aside(self.directory / str(step))}" if move_damaged else "passed over"
                logging.warning("%s; %s", error, fate)
                self._manager.reload()
        return None

    def _read_as(self, step: int, like: PyTree) -> PyTree:
        saved = self._read(step)
        _check_fit(saved, like, self.directory / str(step))
        leaves = [saved[path] for path, _ in named_leaves(like)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def _read(self, step: int) -> dict[str, np.ndarray]:
        """The leaves of one checkpoint by their paths, if they are what was saved."""
        path = self.directory / str(step)
        items = {"state": ocp.args.StandardRestore(), "digests": ocp.args.JsonRestore()}
        try:
            stored = {name: items[name] for name in items if name in _item_names(path)}
            read = self._manager.restore(step, args=ocp.args.Composite(**stored))
            saved = {"/".join(names): leaf for names, leaf in traverse_util.flatten_dict(read.state).items()}
            found = {"step": step, "metrics": self._manager.metrics(step), "sha256": leaf_sha256(saved)}
        except MemoryError:
            raise
        except Exception as error:  # Orbax and TensorStore have many words for garbage
            raise DamagedCheckpoint(
                f"the checkpoint {path} is damaged and cannot be read ({type(error).__name__})"
            ) from error
        if "digests" not in stored:
            logging.warning("the checkpoint %s is of an earlier version, without digests, and was not verified", path)
        elif differing := _differing(found, read.digests):
            raise DamagedCheckpoint(f"the checkpoint {path} is damaged: {differing} is not what was saved")
        return saved

    def wait(self) -> None:
        """Blocks until the save in progress is on disk, and raises what went wrong in it."""
        with self._named_failure():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save in progress and releases Orbax's threads."""
        with self._named_failure():
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    @contextlib.contextmanager
    def _named_failure(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0][:200]
            raise OSError(
                f"the checkpoint of step {self._last_saved} could not be written to {self.directory} ({reason}); "
                "those before it are untouched"
            ) from error

    def _score(self, metrics: dict[str, float]) -> float:
        return metrics.get(self._metric, float("inf"))

    def _move_aside(self, path: Path) -> Path:
        """Renames what is left of a checkpoint into a folder of its own in damaged/."""
        (self.directory / DAMAGED).mkdir(exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f"{path.name}-", dir=self.directory / DAMAGED)) / path.name
        os.replace(path, aside)
        return aside


class _CompleteSteps:
    """Orbax's naming of step directories, blind to those that no complete checkpoint is in.

    Orbax takes any directory with a number for its name as a checkpoint, an empty one too: as the latest to
    resume from, and as one of the last few when old ones are deleted.
    """

    def __init__(self):
        self._all = ocp.path.step.standard_name_format()

    def build_name(self, step: int) -> str:
        return self._all.build_name(step)

    def find_all(self, base_path) -> Iterator[ocp.path.step.Metadata]:
        return (found for found in self._all.find_all(base_path) if _is_complete(Path(found.path)))

    def find_step(self, base_path, step: int) -> ocp.path.step.Metadata:
        return self._all.find_step(base_path, step)


def _item_names(path: Path) -> set[str]:
    """What was saved in a step directory: the state, the metrics and, by this version, the digests."""
    return set(json.loads((path / "_CHECKPOINT_METADATA").read_text())["item_handlers"])


def _is_complete(path: Path) -> bool:
    """Whether every part of a checkpoint is there; `restore` finds out whether it is what was saved."""
    try:
        names = _item_names(path)
        json.loads((path / "metrics" / "metrics").read_text())
    except (OSError, ValueError, LookupError, TypeError):
        return False
    files = ("state/_METADATA", "state/manifest.ocdbt", *names)
    return "state" in names and all((path / name).exists() for name in files)


def _differing(found: dict[str, Any], stored: Any) -> str:
    """The name of the first entry that is not what was stored; "" if all are."""
    if not isinstance(stored, dict) or not isinstance(stored.get("sha256"), dict):
        return "the list of digests"
    for name in sorted(found["sha256"].keys() | stored["sha256"].keys()):
        if found["sha256"].get(name) != stored["sha256"].get(name):
            return name
    return next((name for name in ("step", "metrics") if found[name] != stored.get(name)), "")


def _check_fit(saved: dict[str, np.ndarray], like: PyTree, path: Path) -> None:
    wanted = dict(named_leaves(like))
    for name, leaf in wanted.items():
        if name not in saved:
            raise ValueError(f"{name}, which the config wants, is not in the checkpoint {path}")
        found = saved[name]
        if found.shape != leaf.shape or found.dtype != leaf.dtype:
            raise ValueError(
                f"{name} has shape {found.shape} and dtype {found.dtype} in the checkpoint {path}, "
                f"the config wants {leaf.shape} and {leaf.dtype}"
            )
    for name in sorted(saved.keys() - wanted.keys()):
        raise ValueError(f"{name}, which is in the checkpoint {path}, has no place in the config's model")
