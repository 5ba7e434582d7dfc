"""How fast a run trains."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """The speed of training since the last lap: not of compiling, scoring, saving and drawing."""

    def __init__(self, batch_size: int, step: int):
        self._batch_size, self._step, self._started = batch_size, step, time.monotonic()

    @contextmanager
    def stopped(self, steps: int = 0) -> Iterator[None]:
        """What is done within it takes no time, and of `steps` that are made within it none counts."""
        begun = time.monotonic()
        yield
        self._started += time.monotonic() - begun
        self._step += steps

    def lap(self, step: int) -> dict[str, float]:
        """The images per second up to `step`, if a step counts; the next lap begins there."""
        now, steps = time.monotonic(), step - self._step
        speed = {"images_per_second": steps * self._batch_size / (now - self._started)} if steps else {}
        self._step, self._started = step, now
        return speed
