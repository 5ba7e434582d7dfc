"""Checkpoints, written and read by Orbax.

A checkpoint is a nested dict of host arrays with the names of the training state's leaves (`params/conv_in/kernel`), so
it can be read without this project's classes. It also holds the SHA-256 digest of every leaf, because Orbax silently
restores a file with a flipped bit.
"""

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, SupportsFloat

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers

from diffusion.runtime import orbax_noise, ranking, verification
from diffusion.runtime.digests import leaf_sha256, named_leaves
from diffusion.runtime.late_json import LateJson, LateJsonRestore
from diffusion.runtime.verification import CompleteSteps, DamagedCheckpoint

DAMAGED = "damaged"  # where `resume` moves what cannot be used; nothing is ever deleted from it


def has_begun(directory: Path) -> bool:
    """Whether a checkpoint was ever saved in `directory`, even if it is damaged now."""
    return any(path.name.isdecimal() or path.name == DAMAGED for path in directory.glob("*"))


class Checkpoints:
    """The checkpoints of one run: the last few, and the best.

    Nothing is written before the first `save`. As a context manager it waits for the save in progress.

    Args:
        directory: holds one directory per saved step.
        keep: how many of the latest checkpoints to keep; the one with the lowest val_loss is kept as well.
        data_sha256: the digests of the training data, by name. Every saved checkpoint holds them.
    """

    def __init__(self, directory: str | Path, keep: int = 3, data_sha256: dict[str, str] | None = None):
        if keep < 1:
            raise ValueError(f"cannot keep the last {keep} checkpoints: at least 1 is needed to resume")
        self.directory = Path(directory).absolute()
        self._data_sha256 = data_sha256 or {}
        self._unfinished: int | None = None  # the step whose save is not known to be on disk
        # Orbax keeps what sorts last in descending order; a checkpoint that was not scored comes first.
        best = checkpoint_managers.BestN(get_metric_fn=ranking.score, reverse=True, n=1)
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
                step_name_format=CompleteSteps(),
                preservation_policy=checkpoint_managers.AnyPreservationPolicy([last, best]),
                best_fn=ranking.score,
                best_mode="min",
                multiprocessing_options=alone if jax.process_count() > 1 else ocp.options.MultiprocessingOptions(),
            ),
        )

    def save(self, step: int, state: PyTree, metrics: dict[str, SupportsFloat]) -> None:
        """Starts writing a checkpoint and returns once the state is copied.

        The checkpoint appears under its final name when it is complete. A step that is already saved does not change.
        Errors of the previous save (a full disk) are raised here or by `wait`, those of `check_writable` at once.
        """
        verification.check_writable(self.directory)
        if step in self._manager.all_steps():
            return
        if (self.directory / str(step)).exists():
            self._move_aside(self.directory / str(step))  # Orbax would overwrite what is left of a damaged one
        self.wait()  # before there are two copies of the state
        # A copy, because the next step may reuse the state's buffers. (Orbax makes one of its own.)
        host = {path: np.array(leaf) for path, leaf in named_leaves(state)}
        scores = {name: float(value) for name, value in metrics.items()}
        about = {"step": step, "metrics": scores, "data_sha256": self._data_sha256}
        digests = LateJson(lambda: about | {"sha256": leaf_sha256(host, threads=1)})
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(traverse_util.unflatten_dict(host, sep="/")), digests=digests
        )
        self._unfinished = step
        with self._named_failure():
            try:  # forced, because Orbax would silently skip a step below the latest one
                self._manager.save(step, args=items, metrics=scores, force=True)
            finally:
                digests.begin()

    def latest_step(self) -> int | None:
        """The step of the newest sound checkpoint; None if there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int:
        """The step of the best sound checkpoint: see `ranking.best_step`.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: none was scored.
        """
        self.wait()
        if self.latest_step() is None:
            raise self._no_checkpoint()
        metrics = {step: self._manager.metrics(step) for step in self._manager.all_steps()}
        return ranking.best_step(metrics, self.directory.parent)

    def trained_on(self, only: int | None = None) -> dict[str, str]:
        """The digests of the training data of the newest checkpoint, or of one step; {} if none are recorded."""
        steps = [step for step in self._manager.all_steps() if only in (None, step)]
        for step in sorted(steps, reverse=True):
            with contextlib.suppress(ValueError):  # damaged JSON, which `resume` finds, too
                return self._digests(step).get("data_sha256", {})
        return {}

    def resume(self, like: PyTree) -> PyTree | None:
        """The newest sound checkpoint as `restore` returns it; None if nothing was ever saved.

        Warns about every newer damaged checkpoint and every interrupted save, and moves them into damaged/. Only the
        run that owns the directory may call it. Use `restore` to read without moving anything.

        Raises:
            OSError: a checkpoint cannot be read. Nothing is moved, because this is not damage.
            ValueError: the checkpoint does not fit `like`.
            DamagedCheckpoint: there are checkpoints and none is sound; nothing is moved.
        """
        self.wait()
        state, damaged = self._newest(lambda step: self._read_as(step, like, None))
        moved = [path for path in (self.directory / DAMAGED).glob("*/*") if path.name.isdecimal()]
        if state is None and (damaged or moved):
            named = "; ".join(map(str, damaged.values())) or f"those that were damaged lie in {moved[0].parents[1]}"
            raise DamagedCheckpoint(
                f"{self.directory} has no sound checkpoint ({named}); copy one back to resume, or take another "
                "--workdir to begin anew"
            )
        for path, error in damaged.items():
            logging.warning("%s; moved to %s", error, self._move_aside(path))
        for path in self._entries():
            if ".orbax-checkpoint-tmp" in path.name:
                logging.warning("the save %s was interrupted; moved to %s", path, self._move_aside(path))
        self._manager.reload()
        return state

    def restore(self, step: int | None, like: PyTree) -> PyTree:
        """Reads one checkpoint, or some of the entries at its top, and verifies what it reads.

        Args:
            step: the step of the checkpoint; None for the newest sound one, with a warning about each damaged one
                before it.
            like: a tree of the wanted structure whose leaves have a shape and a dtype (arrays or the structs
                of `jax.eval_shape`). Top-level entries of the checkpoint that `like` lacks are not read.

        Returns:
            A tree of the structure of `like` with NumPy arrays, bit-identical to what was saved.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            OSError: it cannot be read.
            DamagedCheckpoint: it is damaged; the message names the first leaf that is not what was saved.
            ValueError: it does not fit `like`; the message names the first leaf that differs.
        """
        return self._sound(step, lambda step: self._read_as(step, like, _entries_of(like)))

    def entry(self, step: int | None, name: str) -> dict[str, np.ndarray]:
        """Reads one top-level entry of a checkpoint, whatever its structure: the leaves by their paths in the entry.

        It has the arguments and the errors of `restore`.
        """
        leaves = self._sound(step, lambda step: self._read(step, {name}))
        return {path.removeprefix(f"{name}/"): leaf for path, leaf in leaves.items()}

    def _sound(self, step: int | None, read: Callable[[int], Any]) -> Any:
        """What `read` makes of the checkpoint of that step, or of the newest sound one."""
        self.wait()
        steps = sorted(self._manager.all_steps())
        if step is not None:
            if step not in steps:
                raise FileNotFoundError(
                    f"there is no checkpoint of step {step} in {self.directory} (sound ones: {steps or 'none'})"
                )
            return read(step)
        found, damaged = self._newest(read)
        for error in damaged.values():
            logging.warning("%s; passed over", error)
        if found is None:
            raise self._no_checkpoint()
        return found

    def _newest(self, read: Callable[[int], Any]) -> tuple[Any, dict[Path, DamagedCheckpoint]]:
        """What `read` makes of the newest checkpoint that is sound, or None, and the damaged ones that are newer."""
        damaged: dict[Path, DamagedCheckpoint] = {}
        steps = [path for path in self._entries() if path.name.isdecimal()]
        for path in sorted(steps, key=lambda path: int(path.name), reverse=True):
            try:
                return read(int(path.name)), damaged
            except DamagedCheckpoint as error:
                damaged[path] = error
        return None, damaged

    def _no_checkpoint(self) -> FileNotFoundError:
        return FileNotFoundError(f"there is no checkpoint in {self.directory} (sound ones: none)")

    def _entries(self) -> list[Path]:
        return sorted(self.directory.iterdir()) if self.directory.exists() else []

    def _read_as(self, step: int, like: PyTree, entries: set[str] | None) -> PyTree:
        saved = self._read(step, entries)
        verification.check_fit(saved, like, self.directory / str(step))
        leaves = [saved[path] for path, _ in named_leaves(like)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    def _read(self, step: int, entries: set[str] | None) -> dict[str, np.ndarray]:
        """The leaves of one checkpoint, or of these entries of it, by their paths, if they are what was saved."""
        path = self.directory / str(step)
        if not verification.is_complete(path):
            raise DamagedCheckpoint(f"the checkpoint {path} is incomplete")
        try:
            saved, found, stored = self._read_items(step, entries)
        except MemoryError:
            raise
        except Exception:  # Orbax and TensorStore raise many types, for garbage and for a disk that does not answer
            verification.check_readable(path)
            try:  # what failed may have passed
                saved, found, stored = self._read_items(step, entries)
            except Exception as error:
                verification.check_readable(path)
                raise DamagedCheckpoint(
                    f"the checkpoint {path} is damaged and cannot be read ({type(error).__name__})"
                ) from error
        if differing := verification.differing(found, stored):
            raise DamagedCheckpoint(f"the checkpoint {path} is damaged: {differing} is not what was saved")
        return saved

    def _read_items(
        self, step: int, entries: set[str] | None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
        """The leaves by their paths, what their digests are, and what the digests were."""
        stored, how = self._digests(step), ocp.args.PyTreeRestore()
        if entries is not None:
            sha256 = {name: digest for name, digest in stored["sha256"].items() if name.partition("/")[0] in entries}
            item = traverse_util.unflatten_dict({tuple(name.split("/")): 0 for name in sha256})
            stored, how = stored | {"sha256": sha256}, ocp.args.PyTreeRestore(item=item, partial_restore=True)
        read = self._manager.restore(step, args=ocp.args.Composite(state=how))
        saved = {"/".join(names): leaf for names, leaf in traverse_util.flatten_dict(read.state).items()}
        found = {"step": step, "metrics": self._manager.metrics(step), "sha256": leaf_sha256(saved)}
        return saved, found, stored

    def _digests(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(digests=LateJsonRestore())).digests

    def wait(self) -> None:
        """Blocks until the save in progress is on disk, and raises its error if it failed."""
        with self._named_failure():
            self._manager.wait_until_finished()
            self._unfinished = None

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
            if self._unfinished is None:  # no save can have raised it
                raise
            raise OSError(
                f"the checkpoint of step {self._unfinished} could not be written to {self.directory} "
                f"({orbax_noise.reason(error)}); those before it are untouched"
            ) from error

    def _move_aside(self, path: Path) -> Path:
        """Renames what is left of a checkpoint into a folder of its own in damaged/."""
        (self.directory / DAMAGED).mkdir(exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f"{path.name}-", dir=self.directory / DAMAGED)) / path.name
        os.replace(path, aside)
        return aside


def _entries_of(like: PyTree) -> set[str]:
    return {name.partition("/")[0] for name, _ in named_leaves(like)}
