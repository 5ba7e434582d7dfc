"""The speed of training."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """The speed of training since the last lap. Compiling, scoring, saving and drawing do not count."""

    def __init__(self, batch_size: int, step: int):
        self._batch_size, self._step, self._started = batch_size, step, time.monotonic()

    @contextmanager
    def stopped(self, steps: int = 0) -> Iterator[None]:
        """The time spent inside does not count, nor do `steps` that are made inside."""
        begun = time.monotonic()
        yield
        self._started += time.monotonic() - begun
        self._step += steps

    def lap(self, step: int) -> dict[str, float]:
        """The images per second up to `step`, if any step counts. The next lap begins there."""
        now, steps = time.monotonic(), step - self._step
        speed = {"images_per_second": steps * self._batch_size / (now - self._started)} if steps else {}
        self._step, self._started = step, now
        return speed
