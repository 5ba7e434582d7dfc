"""Processes that decode pictures, one per core.

They are separate programs, because `multiprocessing` would run the user's script again, which would need a guard. Each
ends when its stdin does, so none outlives the process that started it.
"""

import collections
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import UInt8

from diffusion.data.resizing import Resizing
from diffusion.runtime import streams

Part = list[tuple[bytes, int]]  # encoded pictures and their classes
Pictures = list[UInt8[np.ndarray, "h w c"]]


class Undecodable(ValueError):
    """A picture is damaged."""


def num_cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # macOS has none
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def decode(resizing: Resizing, channels: int, encoded: list[bytes]) -> Pictures:
    """The pixel values of some pictures.

    Raises:
        Undecodable: one is damaged.
    """
    try:
        return [resizing.pixels(one, channels) for one in encoded]
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises different types for garbage
        raise Undecodable(str(error)) from error


def decoded(
    parts: Iterable[Part], resizing: Resizing, channels: int, num_processes: int
) -> Iterator[tuple[Pictures, list[int]]]:
    """The pictures and the classes of each part, in order. Other processes do the work if more than one is wanted.

    Raises:
        Undecodable: a picture is damaged.
        OSError: a process was killed.
    """
    if num_processes <= 1:
        for part in parts:
            yield decode(resizing, channels, [encoded for encoded, _ in part]), [label for _, label in part]
        return
    with _pool(num_processes) as submit:
        pending: collections.deque = collections.deque()
        for part in parts:
            pending.append((submit(resizing, channels, [encoded for encoded, _ in part]), [label for _, label in part]))
            if len(pending) > num_processes + 1:
                future, labels = pending.popleft()
                yield future.result(), labels
        for future, labels in pending:
            yield future.result(), labels


@contextlib.contextmanager
def _pool(number: int) -> Iterator:
    """A function that hands the arguments of `decode` to the next free process, and returns a future."""
    own, started = threading.local(), []

    def start() -> None:
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        command, pipe = [sys.executable, "-m", __name__], subprocess.PIPE
        # It gets its own process group: only the main process handles a terminal's signals, and it ends the others.
        own.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, env=os.environ | {"PYTHONPATH": path}, process_group=0
        )
        started.append(own.process)

    def call(*task) -> Pictures:
        try:
            pickle.dump(task, own.process.stdin)
            own.process.stdin.flush()
            result = pickle.load(own.process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise OSError(
                "a process that decodes pictures ended, perhaps because memory ran out; the same command goes on"
            ) from error
        if isinstance(result, str):
            raise Undecodable(result)
        return result

    pool = ThreadPoolExecutor(number, thread_name_prefix="decode", initializer=start)
    try:
        yield lambda *task: pool.submit(call, *task)
    finally:
        for process in started:
            process.kill()
        pool.shutdown(cancel_futures=True)
        for process in started:
            process.wait()
            process.stdin.close()
            process.stdout.close()


def _serve() -> None:
    """Decodes the requests on stdin until it ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a scheduler sends them to every process; the main one ends this one
    results, sys.stdout = sys.stdout.buffer, sys.stderr
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            task = pickle.load(sys.stdin.buffer)
            try:
                result = decode(*task)
            except Undecodable as error:
                result = str(error)
            pickle.dump(result, results)
            results.flush()


if __name__ == "__main__":
    streams.guard()
    _serve()
