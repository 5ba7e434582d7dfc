"""Checkpoints: the only file that names Orbax.

A checkpoint is a nested dict of host arrays, named as the leaves of the training state are
(`params/conv_in/kernel`), so it can be read without this project's classes.
"""

import hashlib
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
from orbax.checkpoint import checkpoint_managers

PyTree = Any

# Orbax reports every phase of every save through absl's logger; failures reach the caller as exceptions.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


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
        # Orbax keeps what sorts last in descending order; a checkpoint that was not scored comes first.
        best = checkpoint_managers.BestN(get_metric_fn=self._score, reverse=True, n=1)
        last = checkpoint_managers.LatestN(keep)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                create=False,
                step_name_format=_SoundSteps(),
                preservation_policy=checkpoint_managers.AnyPreservationPolicy([last, best]),
                best_fn=self._score,
                best_mode="min",
            ),
        )

    def save(self, step: int, state: PyTree, metrics: dict[str, SupportsFloat]) -> None:
        """Starts writing a checkpoint and returns once the state is copied.

        The checkpoint appears under its final name when it is complete. A step that is already saved is left
        as it is. Errors of the previous save (a full disk) are raised here or by `wait`.
        """
        if step in self._manager.all_steps():
            return
        if jax.process_index() == 0:
            self._move_aside(step)
        # Orbax copies NumPy arrays before it goes asynchronous; the next step may reuse the state's buffers.
        host = {tuple(path.split("/")): np.asarray(leaf) for path, leaf in _named_leaves(state)}
        items = ocp.args.Composite(state=ocp.args.StandardSave(traverse_util.unflatten_dict(host)))
        scores = {name: float(value) for name, value in metrics.items()}
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

    def restore(self, step: int | None, like: PyTree) -> PyTree:
        """Reads one checkpoint.

        Args:
            step: which one; None is the latest.
            like: a tree of the wanted structure whose leaves have a shape and a dtype (arrays or the structs
                of `jax.eval_shape`).

        Returns:
            A tree of the structure of `like` with NumPy arrays, bit-identical to what was saved.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: the checkpoint is damaged, or it does not fit `like`; the message names the first
                leaf that differs.
        """
        self.wait()
        steps = sorted(self._manager.all_steps())
        step = self.latest_step() if step is None else step
        if step not in steps:
            wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise FileNotFoundError(f"there is {wanted} in {self.directory} (sound ones: {steps or 'none'})")
        try:
            items = ocp.args.Composite(state=ocp.args.StandardRestore())
            read = self._manager.restore(step, args=items).state
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(
                f"the checkpoint {self.directory / str(step)} is damaged and cannot be read; move it away to "
                f"go on from an earlier one ({type(error).__name__})"
            ) from error
        saved = {"/".join(path): leaf for path, leaf in traverse_util.flatten_dict(read).items()}
        _check_fit(saved, like, self.directory / str(step))
        leaves = [saved[path] for path, _ in _named_leaves(like)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def wait(self) -> None:
        """Blocks until the save in progress is on disk, and raises what went wrong in it."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save in progress and releases Orbax's threads."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _score(self, metrics: dict[str, float]) -> float:
        return metrics.get(self._metric, float("inf"))

    def _move_aside(self, step: int) -> None:
        """Renames what is left of a damaged checkpoint, which Orbax would overwrite."""
        damaged = self.directory / str(step)
        if damaged.exists():
            os.replace(damaged, tempfile.mkdtemp(prefix=f"{step}.damaged-", dir=self.directory))


class _SoundSteps:
    """Orbax's naming of step directories, blind to those that no complete checkpoint is in.

    Orbax takes any directory with a number for its name as a checkpoint, an empty one too: as the latest to
    resume from, and as one of the last few when old ones are deleted.
    """

    def __init__(self):
        self._all = ocp.path.step.standard_name_format()

    def build_name(self, step: int) -> str:
        return self._all.build_name(step)

    def find_all(self, base_path) -> Iterator[ocp.path.step.Metadata]:
        return (found for found in self._all.find_all(base_path) if _is_sound(Path(found.path)))

    def find_step(self, base_path, step: int) -> ocp.path.step.Metadata:
        return self._all.find_step(base_path, step)


def _is_sound(path: Path) -> bool:
    try:
        json.loads((path / "metrics" / "metrics").read_text())
    except (OSError, ValueError):
        return False
    return (path / "state" / "_METADATA").exists() and (path / "state" / "manifest.ocdbt").exists()


def _named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def _check_fit(saved: dict[str, np.ndarray], like: PyTree, path: Path) -> None:
    wanted = dict(_named_leaves(like))
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


def tree_sha256(tree: PyTree) -> str:
    """SHA-256 over the leaves' paths, dtypes, shapes and bytes, in the order of the paths.

    Two trees have the same digest exactly if they hold the same numbers, bit by bit, under the same names.
    """
    digest = hashlib.sha256()
    for name, leaf in sorted(_named_leaves(tree), key=lambda named: named[0]):
        array = np.asarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
