"""Progress bars: the part of a long job that is done, and the time left."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from tqdm import tqdm

QUICK_SECONDS = 1.0  # faster compilations, such as those from a cache, print no line


class Progress(tqdm):
    """A progress bar with the time left, on process 0; a line every ten seconds if the output is not a terminal.

    Args:
        total: the number of units of the whole job.
        initial: the number of units that an earlier, stopped run has done.
        desc: the name of the job, such as "train".
        unit: the name of a unit, such as "step".
    """

    def __init__(self, total: int, initial: int = 0, desc: str = "", unit: str = "step"):
        terminal = {"dynamic_ncols": True}
        log_file = {
            "mininterval": 10.0,
            "maxinterval": 10.0,
            "bar_format": "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]\n",
        }
        self._on_terminal, self._compiled = sys.stderr.isatty(), set()
        style = terminal if self._on_terminal else log_file
        super().__init__(total=total, initial=initial, desc=desc, unit=unit, disable=jax.process_index() > 0, **style)

    @contextmanager
    def compiling(self, program: int = 0) -> Iterator[None]:
        """A context for calls of `program`. While the first call compiles, the bar says so.

        The time of the first call does not count in the speed or the time left. Later calls pass through.
        """
        is_new = self.is_new(program)
        self._compiled.add(program)
        if not is_new or self.disable:
            yield
            return
        begun, done = self._time(), threading.Event()
        thread = threading.Thread(target=self._tell, args=(begun, done), daemon=True)
        if self._on_terminal:
            thread.start()
        try:
            yield
        finally:
            done.set()
            if self._on_terminal:
                thread.join()
        seconds = self._time() - begun
        self.start_t += seconds
        self.last_print_t += seconds
        if seconds >= QUICK_SECONDS and not self._on_terminal:
            print(f"{self.desc.rstrip(': ')}: compiling took {seconds:.0f} s", file=sys.stderr)

    def is_new(self, program: int = 0) -> bool:
        """Whether `program` has not been called within `compiling` yet."""
        return program not in self._compiled

    def _tell(self, begun: float, done: threading.Event) -> None:
        """Shows the seconds of compiling instead of the bar, until it is done."""
        words = self.desc.rstrip(": ")
        while not done.wait(QUICK_SECONDS):
            self.display(f"{words}: compiling, {self._time() - begun:.0f} s")
