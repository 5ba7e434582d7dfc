"""Several processes as one run, on one machine or on many: who they are, and what the first one does for all."""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

MESSAGE_BYTES = 2000


def join(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    """Makes this process one of several; nothing happens where it is the only one.

    Args:
        coordinator: "host:port" of the first process; "auto" to let JAX ask the cluster; "" to do so exactly where
            srun started several tasks or a TPU slice names several workers.
        num_processes, process_id: of a coordinator that is given; None where JAX finds them.

    Raises:
        ValueError: the flags do not fit together.
    """
    if (num_processes is None) != (process_id is None) or num_processes is not None and coordinator in ("", "auto"):
        raise ValueError("--coordinator=HOST:PORT, --num_processes and --process_id are given together or not at all")
    if num_processes is not None:
        if not 0 <= process_id < num_processes:
            raise ValueError(f"--process_id={process_id} must be in 0…{num_processes - 1}")
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif coordinator not in ("", "auto"):
        raise ValueError(f"--coordinator={coordinator} needs --num_processes and --process_id")
    elif coordinator == "auto" or _is_one_of_several(os.environ):
        jax.distributed.initialize()


def _is_one_of_several(environment: dict[str, str]) -> bool:
    under_srun = "SLURM_STEP_NODELIST" in environment and "SLURM_PROCID" in environment
    slurm_tasks = int(environment.get("SLURM_NTASKS", 1)) if under_srun else 1
    tpu_workers = len(environment.get("TPU_WORKER_HOSTNAMES", "").split(","))
    return max(slurm_tasks, tpu_workers) > 1


def is_first() -> bool:
    """Whether this process writes the logs, pictures and checkpoints."""
    return jax.process_index() == 0


def from_first(tree: PyTree) -> PyTree:
    """The first process's tree of arrays, bit by bit, on every process; the others give one of the same shapes."""
    if jax.process_count() == 1:
        return tree
    arrays = jax.tree.map(np.asarray, tree)
    # As bytes, because the numbers are sent as a sum, in which -0.0 would become 0.0.
    as_bytes = jax.tree.map(lambda array: np.ascontiguousarray(array).reshape(-1).view(np.uint8), arrays)
    received = multihost_utils.broadcast_one_to_all(as_bytes)
    return jax.tree.map(lambda sent, array: np.asarray(sent).view(array.dtype).reshape(array.shape), received, arrays)


def on_first(action: Callable[[], Any]) -> Any:
    """Calls `action` on the first process alone, and returns its result there and None elsewhere.

    Raises:
        ValueError, OSError: `action` raised it; on every process, so that none waits for another in vain.
    """
    if jax.process_count() == 1:
        return action()
    result, failure = None, ""
    if is_first():
        try:
            result = action()
        except (ValueError, OSError) as error:
            failure = str(error) or type(error).__name__
    message = failure.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES)
    if failure := from_first(np.frombuffer(message, np.uint8)).tobytes().decode(errors="replace").strip():
        raise ValueError(failure)
    return result
