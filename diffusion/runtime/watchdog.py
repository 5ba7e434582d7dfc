"""Dumps every thread's stack if a step takes far longer than usual, to show where a run hangs."""

import collections
import contextlib
import faulthandler
import statistics
import sys
import time
from collections.abc import Iterator
from typing import TextIO

FACTOR = 10  # × the median step
WARM_UP = 5  # steps that are not watched: the first ones compile


class Watchdog:
    """Watches the code inside `step()`. A thread that needs no Python writes the dump, so a hang in C is seen.

    Args:
        at_least: the seconds below which no step is too slow, because a busy machine causes shorter pauses.
        file: the file for the stacks; it must have a file descriptor.
    """

    def __init__(self, at_least: float = 10.0, file: TextIO = sys.__stderr__):
        self._at_least, self._file = at_least, file
        self._seconds: collections.deque[float] = collections.deque(maxlen=101)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Dumps the stacks once, while the code inside still runs, if it takes FACTOR times the median."""
        if len(self._seconds) >= WARM_UP:
            limit = max(FACTOR * statistics.median(self._seconds), self._at_least)
            faulthandler.dump_traceback_later(limit, file=self._file)
        started = time.monotonic()
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
        self._seconds.append(time.monotonic() - started)
