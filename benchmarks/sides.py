"""Our arms beside a peer's: on a CPU each side has a process of its own, with its own allocator and threads."""

import argparse
import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from benchmarks import timing
from benchmarks.timing import Arms, Cost
from diffusion.runtime import allocator

Make = Callable[[argparse.Namespace], Arms]  # a function at a module's top level: another process imports it by name

_SPAWN = multiprocessing.get_context("spawn")  # a fork would share our allocator's settings


def arguments(doc: str, name: str) -> argparse.ArgumentParser:
    """As timing.arguments, with the peer's allocator."""
    parser = timing.arguments(doc, name)
    parser.add_argument(
        "--peer-allocator",
        default="default",
        metavar="default|kept|LIBRARY",
        help="on a CPU: unchanged, set to keep freed memory like ours, or a preloaded library's",
    )
    return parser


def measured(args: argparse.Namespace, ours: Make, peers: Make | None) -> tuple[dict[str, Cost], dict[str, dict]]:
    """The costs of all arms and their own columns, by the arms' names.

    Ours run as a user runs them, with the environment's allocator. On an accelerator all arms share this process: its
    memory is not malloc's, and JAX claims most of it.
    """
    if jax.default_backend() != "cpu":
        arms = ours(args) | (peers(args) if peers else {})
        costs = timing.in_this_process(arms, args.rounds)
        return costs, {name: arm.columns for name, arm in arms.items()}
    sides = [(ours, {})] + ([(peers, peer_environment(args.peer_allocator))] if peers else [])
    columns, pipe_of = {}, {}
    with contextlib.ExitStack() as stack:
        for make, environment in sides:
            pipe = stack.enter_context(_process(make, args, environment))
            known = _answer(pipe)
            columns |= known
            pipe_of |= dict.fromkeys(known, pipe)

        def measure(name: str) -> Cost:
            pipe_of[name].send(name)
            return _answer(pipe_of[name])

        return timing.alternate(measure, list(columns), args.rounds), columns


def peer_environment(name: str) -> dict[str, str]:
    """The environment variables that select the allocator of this name."""
    if name in ("default", "kept"):
        return {allocator.SWITCH: "0" if name == "default" else "1"}
    if not Path(name).is_file():  # the system would run without it, silently
        raise ValueError(f"--peer-allocator={name} is neither default nor kept nor a library's file")
    return {"LD_PRELOAD": name}


@contextlib.contextmanager
def _process(make: Make, args: argparse.Namespace, environment: dict[str, str]) -> Iterator[Connection]:
    """A process that makes and warms its arms. Send an arm's name into the pipe, and it returns the cost of a call."""
    pipe, end = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_serve, args=(make, args, end))
    with mock.patch.dict(os.environ, environment):
        process.start()
    end.close()  # now only the process holds it, so this side sees when the process ends
    try:
        yield pipe
    finally:
        pipe.close()
        process.join()


def _answer(pipe: Connection) -> Any:
    """The next answer of a side's process. Raises its error if that is one of input, such as a wrong size."""
    try:
        answer = pipe.recv()
    except EOFError:
        raise RuntimeError("a side's process ended; its error is above") from None
    if isinstance(answer, ValueError):
        raise answer
    return answer


def _serve(make: Make, args: argparse.Namespace, pipe: Connection) -> None:
    try:
        arms = timing.warm(make(args))
    except ValueError as error:
        pipe.send(error)
        return
    with contextlib.suppress(EOFError, BrokenPipeError):  # the other side has closed the pipe
        pipe.send({name: arm.columns for name, arm in arms.items()})
        while True:
            pipe.send(timing.cost(arms[pipe.recv()].call))
