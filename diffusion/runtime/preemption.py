"""Signals that ask a run to stop. Schedulers send them before they kill a run."""

import contextlib
import os
import signal
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # os.EX_TEMPFAIL: the run is not finished, and the same command continues it


class Preempted(SystemExit):
    """The run was asked to stop. The program ends with EXIT_CODE."""

    def __init__(self, reason: str):
        super().__init__(EXIT_CODE)
        self.reason = reason


def point() -> None:
    """Inside `Preemption.at_points`, raises `Preempted` if a signal has asked to stop; does nothing elsewhere."""
    if _entered is not None and _entered.stops_at_points and _entered.signal_name:
        raise _entered.stop()


class Preemption:
    """While entered, SIGTERM, SIGHUP and SIGINT raise `Preempted` at once, or set `signal_name` inside `deferred`.

    A second SIGINT always interrupts at once, because a person at the keyboard means it. In a multi-process run JAX's
    coordination service receives SIGTERM and tells every process where to stop. SIGHUP is passed on to it as a SIGTERM,
    and SIGINT keeps its usual meaning. A SIGHUP that is ignored (nohup) stays ignored. A SIGINT does not, or
    the background job of a script (`&`) could not be asked to save.
    """

    def __init__(self):
        self.signal_name = ""
        self.stops_at_points = False
        self._deferring = False
        self._asked = 0

    def __enter__(self) -> "Preemption":
        alone = jax.process_count() == 1
        handlers = dict.fromkeys((signal.SIGTERM, signal.SIGINT) if alone else (), self._receive)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            handlers[signal.SIGHUP] = self._receive if alone else _pass_on
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        _enter(self)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        _enter(None)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Defers the stop to the time between two steps: see `is_due`."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self.signal_name:  # it came with the last step
            raise self.stop()

    @contextlib.contextmanager
    def at_points(self) -> Iterator[None]:
        """Defers the exception to calls of `point`. Some libraries take an exception inside them for an error."""
        self.stops_at_points = True
        try:
            with self.deferred():
                yield
        finally:
            self.stops_at_points = False

    def is_due(self) -> bool:
        """Whether to save and stop now. Every process asks after each call, and all get the answer at the same call."""
        if jax.process_count() > 1:
            # JAX stops one past the furthest process, so this has to count by ones, which steps need not.
            self._asked += 1
            if multihost_utils.reached_preemption_sync_point(self._asked):
                self.signal_name = "a signal"  # JAX says so once; with the last step it is handled after `deferred`
        return bool(self.signal_name)

    def check(self) -> None:
        """Raises `Preempted` if a signal asked to stop. Call it between parts of work that need no save of their own.

        A single process stops as the signal comes, or here if the signal came where Python drops exceptions, such as a
        callback of its garbage collector. In a multi-process run every process must call it at the same point.
        """
        if self.is_due():
            raise self.stop()

    def _receive(self, number: int, _frame) -> None:
        is_first, self.signal_name = not self.signal_name, signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if is_first and not self._deferring:  # a later one must not break off the save that the first one asked for
            raise self.stop()

    def stop(self) -> Preempted:
        return Preempted(f"stopped by {self.signal_name}; the same command goes on")


_entered: Preemption | None = None


def _enter(preemption: Preemption | None) -> None:
    global _entered
    _entered = preemption


def _pass_on(_number: int, _frame) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
