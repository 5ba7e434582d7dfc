"""Multi-process runs, on one machine or many: joining them, and the work that process 0 does for all."""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

MESSAGE_BYTES = 2000
PART_BYTES = 2**26  # of a tree that is sent at a time
MAX_WAIT_MS = 24 * 60 * 60 * 1000
_BARRIERS = itertools.count()  # every process comes to the same ones, in the same order


def join(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    """Makes this process a part of a multi-process run. A single process does nothing.

    Args:
        coordinator: "host:port" of process 0; "" to let JAX detect the cluster (Slurm, Cloud TPU VMs, MPI,
            Kubernetes), which is joined if it has more than one process.
        num_processes, process_id: required with a coordinator; None if JAX finds them.

    Raises:
        ValueError: the flags do not fit together, or the devices belong to more processes than were joined.
    """
    given = [coordinator != "", num_processes is not None, process_id is not None]
    if any(given) and not all(given):
        raise ValueError("--coordinator=HOST:PORT, --num_processes and --process_id are given together or not at all")
    if all(given):
        if not 0 <= process_id < num_processes:
            raise ValueError(f"--process_id={process_id} must be in 0…{num_processes - 1}")
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif detected_processes() > 1:
        jax.distributed.initialize()
    check_joined()


def detected_processes() -> int:
    """The number of processes in the cluster that JAX would detect; 1 if it detects none.

    `jax.distributed.initialize` does not tell. For a single process its error may also come from a cluster that does
    not answer. In a cluster of one process it opens a port, and a second program in the same job would find the port
    taken.
    """
    try:
        from jax._src.clusters import ClusterEnv  # JAX has no public way to ask what it would detect

        clusters = (env for env in ClusterEnv._cluster_types if not env.opt_in_only_method)
        cluster = next((env for env in clusters if env.is_env_present()), None)
        return 1 if cluster is None else cluster.get_process_count()
    except Exception as error:  # a cluster's own service that does not answer, for example in a plain Kubernetes pod
        logging.warning("the cluster could not be asked (%s); alone unless --coordinator is given", error)
        return 1


def check_joined() -> None:
    """Raises a ValueError if this is one of several processes that do not know of each other.

    The devices of a TPU slice belong together even then, but no signal would reach the other processes.
    """
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ValueError(
            f"the devices belong to {jax.process_count()} processes that are not joined; "
            "add --coordinator=HOST:PORT --num_processes=N --process_id=I"
        )


def is_first() -> bool:
    """Whether this process writes the logs, pictures and checkpoints."""
    return jax.process_index() == 0


def from_first(tree: PyTree) -> PyTree:
    """Process 0's tree of arrays, bit-identical on every process. The others pass a tree of the same shapes.

    It is sent in parts, each of which lies on every device. A whole state would take twice its size there.
    """
    if jax.process_count() == 1:
        return tree
    arrays = jax.tree.map(np.asarray, tree)
    # As bytes, because the numbers are sent as a sum, in which -0.0 would become 0.0.
    sent = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in jax.tree.leaves(arrays)]
    received = [np.empty_like(leaf) for leaf in sent]
    for part in _parts([len(leaf) for leaf in sent]):
        message = np.concatenate([sent[number][begin:end] for number, begin, end in part])
        # Every large part has one size, so that it is one program.
        padded = np.pad(message, (0, PART_BYTES - len(message))) if sum(map(len, sent)) > PART_BYTES else message
        answer, at = np.asarray(multihost_utils.broadcast_one_to_all(padded)), 0
        for number, begin, end in part:
            received[number][begin:end] = answer[at : at + end - begin]
            at += end - begin
    whole = jax.tree.unflatten(jax.tree.structure(arrays), received)
    return jax.tree.map(lambda leaf, array: leaf.view(array.dtype).reshape(array.shape), whole, arrays)


def _parts(sizes: list[int]) -> Iterator[list[tuple[int, int, int]]]:
    """Slices (number of the leaf, begin, end) of leaves of these sizes, in parts of at most PART_BYTES."""
    part, left = [], PART_BYTES
    for number, size in enumerate(sizes):
        begin = 0
        while begin < size:
            end = min(size, begin + left)
            part.append((number, begin, end))
            left -= end - begin
            begin = end
            if not left:
                yield part
                part, left = [], PART_BYTES
    if part:
        yield part


def bool_from_first(value: bool) -> bool:
    """The value of process 0, on every process."""
    return bool(from_first(np.asarray(value)))


def wait_for_all(what: str) -> None:
    """Waits until every process has reached this point, for up to a day. A collective would give up after minutes.

    Args:
        what: the name of the point.
    """
    if jax.process_count() == 1:
        return
    from jax._src import distributed  # the public way to wait for all processes is a collective

    if (client := distributed.global_state.client) is not None:
        client.wait_at_barrier(f"diffusion {what} {next(_BARRIERS)}", timeout_in_ms=MAX_WAIT_MS)


def check_same(text: Callable[[], str], complaint: str) -> None:
    """Raises a ValueError on every process unless all have the same text. The text must have the same length on all.

    Args:
        text: makes the text. It is not called if there is only one process.
        complaint: the end of the error message, after the numbers of the processes that differ from process 0.
    """
    if jax.process_count() == 1:
        return
    own = np.frombuffer(text().encode(), np.uint8)
    wait_for_all("text")  # which on some hosts may take longer
    texts = multihost_utils.process_allgather(own)
    if len(differing := np.flatnonzero((texts != texts[0]).any(axis=1))):
        raise ValueError(f"process {', '.join(map(str, differing))} against process 0: {complaint}")


def on_first(action: Callable[[], Any]) -> Any:
    """Calls `action` on process 0 alone. Returns its result there and None elsewhere.

    Raises:
        ValueError: `action` raised it or an OSError. It is raised on every process, so that none waits in vain.
        Exception: `action` raised another exception. Process 0 raises it as it is; the others raise a ValueError that
            names it.
    """
    if jax.process_count() == 1:
        return action()
    result, failure, bug = None, "", None
    if is_first():
        try:
            result = action()
        except (ValueError, OSError) as error:
            failure = str(error) or type(error).__name__
        except Exception as error:  # its traceback belongs on process 0, but nobody may wait for it
            bug, failure = error, f"process 0 failed: {type(error).__name__}: {error}"
    wait_for_all("result")  # the action may have taken long
    message = failure.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES)
    if failure := from_first(np.frombuffer(message, np.uint8)).tobytes().decode(errors="replace").strip():
        raise bug or ValueError(failure)
    return result


class Stopped(Exception):
    """A stop was asked for between two parts."""


def on_first_in_parts(action: Callable[[Iterator[Any]], Any], parts: Iterable[Any], stops: Callable[[], bool]) -> Any:
    """`on_first` of an action that takes parts one after another. Before each part every process asks whether to stop.

    Args:
        action: takes an iterator over `parts`.
        parts: what process 0 works on. Other processes do not look at it.
        stops: whether to stop. Every process calls it equally often, and all must get the same answer.

    Raises:
        Stopped: `stops` said so, on every process.
        ValueError, Exception: as `on_first` does.
    """
    stopped = False

    def asked() -> Iterator[Any]:
        nonlocal stopped
        for part in parts:
            _another_part(True)
            if stopped := stops():
                raise Stopped
            yield part

    def act() -> Any:
        try:
            return action(asked())
        except Stopped:
            return None
        finally:
            if not stopped:  # the others wait for another part, also after an error
                _another_part(False)

    while not is_first() and not stopped and _another_part():
        stopped = stops()
    result = on_first(act)
    if stopped:
        raise Stopped
    return result


def _another_part(follows: bool = False) -> bool:
    """What process 0 says about whether another part follows. The part before may have taken long."""
    wait_for_all("part")
    return bool_from_first(follows)
