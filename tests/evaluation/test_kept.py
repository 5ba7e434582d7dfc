"""Saved parts of an evaluation: finished parts are not measured again, and NaN never counts as finished."""

import numpy as np
import pytest

from diffusion.evaluation import kept
from diffusion.evaluation.pairs import ImagePairs
from diffusion.runtime.devices import Replicated

NUMBERS, VALUES = np.array([7, 2, 9]), np.arange(6.0).reshape(3, 2)


class Pairs(ImagePairs):
    """Two pairs at a time, of which the numbers are known; stopped after so many batches."""

    def __init__(self, batches, bad=None):
        self.batches, self.bad, self.measured = batches, bad, []

    def some(self, model, source, numbers, values, desc, is_done=None):
        for batch in np.arange(values.size).reshape(-1, 2):
            if is_done[batch].all():
                continue
            if not self.batches:
                raise InterruptedError
            self.batches -= 1
            self.measured += batch.tolist()
            first = np.where(batch == self.bad, np.nan, values.ravel()[batch])
            yield batch, np.stack([first, -first], axis=1).astype(np.float32)


@pytest.fixture
def measure(tmp_path, source):
    def of(pairs):
        return kept.measured(pairs, Replicated(None), source, NUMBERS, VALUES, 2, tmp_path / "a" / "test.npy", "test")

    return of


def test_a_call_that_was_stopped_goes_on(measure):
    stopped, after, again = Pairs(1), Pairs(9), Pairs(9)
    with pytest.raises(InterruptedError):
        measure(stopped)
    wanted = np.stack([VALUES, -VALUES], axis=-1)
    np.testing.assert_array_equal(measure(after), wanted)
    np.testing.assert_array_equal(measure(again), wanted)
    assert (stopped.measured, after.measured, again.measured) == ([0, 1], [2, 3, 4, 5], [])


def test_nan_is_an_error_that_names_the_image_and_what_came_before_stays(measure):
    with pytest.raises(FloatingPointError, match="test: NaN or Inf for image 2 of the test split"):
        measure(Pairs(9, bad=3))
    after = Pairs(9)
    measure(after)
    assert after.measured == [2, 3, 4, 5]
