"""The examples of each training step."""

import numpy as np
import pytest

from diffusion import data


@pytest.mark.parametrize("batch_size, num_examples", [(4, 10), (10, 10), (7, 10), (25, 10), (1, 1)])
def test_every_epoch_is_a_permutation(batch_size, num_examples):
    steps = 4 * num_examples
    stream = np.concatenate([data.batch_indices(3, step, batch_size, num_examples) for step in range(steps)])
    assert stream.dtype == np.int32 and len(stream) == steps * batch_size
    epochs = np.sort(stream.reshape(-1, num_examples), axis=1)
    np.testing.assert_array_equal(epochs, np.broadcast_to(np.arange(num_examples), epochs.shape))


def test_batches_depend_on_seed_and_step_alone():
    batch = data.batch_indices(0, 5, 32, 100)
    batches = [data.batch_indices(seed, step, 32, 100) for seed in range(3) for step in range(9)]
    np.testing.assert_array_equal(batches[5], batch)
    assert len({batch.tobytes() for batch in batches}) == 27
    batch[:] = -1  # the caller owns the result: the cached permutation stays intact
    assert data.batch_indices(0, 5, 32, 100).min() >= 0


def test_epochs_are_shuffled_anew():
    first, second = (data.batch_indices(0, step, 1000, 1000) for step in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.15  # five standard errors of independent orders
    assert abs(np.corrcoef(first, np.arange(1000))[0, 1]) < 0.15


@pytest.mark.parametrize("arguments", [(0, 0, 0, 10), (0, 0, 4, 0), (0, -1, 4, 10), (-1, 0, 4, 10)])
def test_impossible_batches_are_refused(arguments):
    with pytest.raises(ValueError, match="at least"):
        data.batch_indices(*arguments)
