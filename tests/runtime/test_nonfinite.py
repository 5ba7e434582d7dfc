"""A NaN or Inf stops training and is reported with its step, its numbers, its t, and the norms around it."""

import numpy as np
import pytest

from diffusion.runtime import nonfinite

GROUPS = ["conv_in", "conv_out"]


def metrics(num_steps=2):
    """Of a sound call."""
    return {
        "loss": np.full(num_steps, 2.0),
        "grad_norm": np.full(num_steps, 3.0),
        "t": np.tile([4, 1, 9], (num_steps, 1)),
        "losses": np.tile([1.0, 2.0, 3.0], (num_steps, 1)),
        "param_norms": np.tile([10.0, 20.0], (num_steps, 1)),
        "grad_norms": np.tile([0.5, 0.25], (num_steps, 1)),
    }


def test_finite_numbers_pass():
    nonfinite.check([(range(1, 3), metrics()), (range(3, 5), metrics())], GROUPS, skipped=0, allowed=0)


def test_the_first_step_is_named_with_all_that_is_known_of_it():
    bad = metrics()
    bad["loss"][1] = bad["losses"][1, 1] = bad["losses"][1, 2] = np.nan
    bad["grad_norm"][1] = bad["grad_norms"][1, 1] = np.inf
    later = metrics()
    later["loss"][0] = np.nan
    with pytest.raises(FloatingPointError) as error:
        nonfinite.check([(range(1, 3), metrics()), (range(3, 5), bad), (range(5, 7), later)], GROUPS, 0, 0)
    message = str(error.value)
    assert message.startswith("step 4: loss = nan, grad_norm = inf; ") and "\n" not in message
    assert "at t = 1, 9; " in message
    assert "norms of the parameters before step 3: conv_in 10, conv_out 20; " in message
    assert "norms of the gradient: conv_in 0.5, conv_out inf; " in message


def test_where_every_example_is_finite_the_largest_loss_is_named():
    bad = metrics()
    bad["grad_norm"][0] = np.nan
    with pytest.raises(FloatingPointError, match="step 1: grad_norm = nan; .*the largest is 3 at t = 9"):
        nonfinite.check([(range(1, 3), bad)], GROUPS, 0, 0)


def test_updates_may_be_left_out_until_there_are_too_many():
    bad = metrics()
    bad["loss"][0] = np.nan
    nonfinite.check([(range(1, 3), bad)], GROUPS, skipped=2, allowed=2)
    with pytest.raises(FloatingPointError, match="3 updates were left out, train.skip_nonfinite=2"):
        nonfinite.check([(range(1, 3), bad)], GROUPS, skipped=3, allowed=2)
