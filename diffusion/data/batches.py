"""The examples of each step: a pure function of (seed, step), so resuming needs only the step."""

import functools

import numpy as np
from jaxtyping import Int32


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_examples: int) -> Int32[np.ndarray, "{num_examples}"]:
    return np.random.default_rng((seed, epoch)).permutation(num_examples).astype(np.int32)


def batch_indices(seed: int, step: int, batch_size: int, num_examples: int) -> Int32[np.ndarray, "{batch_size}"]:
    """The examples of training step `step`, counted from 0.

    Every epoch is a permutation of its own, and epochs follow one another without a gap. A batch may cross the end of
    an epoch or span several epochs. Each example still comes exactly once per epoch.

    Args:
      seed: any integer >= 0.
      step: steps taken before this one, >= 0.
      batch_size: examples per step, over all devices.
      num_examples: size of the data set.

    Raises:
      ValueError: a size below 1, or a negative seed or step.
    """
    if batch_size < 1 or num_examples < 1 or seed < 0 or step < 0:
        raise ValueError(
            f"batch_size={batch_size} and num_examples={num_examples} must be at least 1, "
            f"seed={seed} and step={step} at least 0"
        )
    begin, end = step * batch_size, (step + 1) * batch_size
    parts = []
    while begin < end:
        epoch, offset = divmod(begin, num_examples)
        part = _permutation(seed, epoch, num_examples)[offset : offset + end - begin]
        parts.append(part)
        begin += len(part)
    return np.concatenate(parts)
