"""Several steps per compiled call are the same steps, also after a signal and from the disk."""

import contextlib
import dataclasses
import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest
import toy

from diffusion import timesteps
from diffusion.data import Source
from diffusion.experiment import build
from diffusion.reporting import loggers
from diffusion.reporting.metrics_log import Logger, read_metrics
from diffusion.runtime.checkpoint import Checkpoints
from diffusion.runtime.digests import named_leaves, tree_sha256
from diffusion.runtime.preemption import Preempted
from diffusion.training import loop, parallel

pytestmark = pytest.mark.usefixtures("steps_compiled_once")


@pytest.fixture
def taken():
    """The lengths of the last run's calls."""
    return []


def with_calls_of(steps_per_call, directory, taken, **keys):
    """The toy with so many steps per call, though on a CPU: its last state. `taken` gets the lengths of its calls."""
    plan_of, train_steps = build.plan, parallel.train_steps

    def plan(config):
        return dataclasses.replace(plan_of(config), steps_per_call=steps_per_call)

    def watched(training, seed):
        compiled = train_steps(training, seed)

        def call(state, batch):
            taken.append(batch.indices.shape[1])
            return compiled(state, batch)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "plan", plan)
        patch.setattr(parallel, "train_steps", watched)
        small = {"train__num_steps": 20, "train__log_every": 5, "train__checkpoint_every": 10}
        return toy.run(toy.experiment(**small | keys), directory)


@pytest.fixture
def run(taken):
    """A function: the last state of `with_calls_of`, and the lengths of the calls."""

    def run(steps_per_call, directory, **keys):
        taken.clear()
        state = with_calls_of(steps_per_call, directory, taken, **keys)
        return state, list(taken)

    return run


@pytest.fixture(scope="module")
def straight(steps_compiled_once, tmp_path_factory):
    """The directory of a run with calls of 4 steps that was never stopped, and its last state."""
    directory = tmp_path_factory.mktemp("straight")
    return directory, with_calls_of(4, directory, [])


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def assert_same_run(one, other):
    """Counts are equal; floats differ by what two programs of the same sums may: one has a loop, the other none.

    Adam divides by √v, so a rounding in a gradient near 0 may move a parameter by a part of the learning rate.
    """
    for (name, a), (_, b) in zip(named_leaves(one), named_leaves(other), strict=True):
        if np.issubdtype(a.dtype, np.integer):
            np.testing.assert_array_equal(a, b, err_msg=name)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5, err_msg=name)


def assert_same_rows(one, other):
    for a, b in zip(read_metrics(one), read_metrics(other), strict=True):
        for row in (a, b):
            row.pop("images_per_second", None)  # a row has none where all of its steps were compiled
        assert a.keys() == b.keys() and a["step"] == b["step"]
        for name in a.keys() - {"step"}:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-6, err_msg=f"{name} at {a['step']}")


def assert_calls_of_four_are_single_steps(run, directory, **keys):
    """The state after calls of 4 steps, if it and the rows are those of single steps."""
    one, single = run(1, directory / "1", **keys)
    four, taken = run(4, directory / "4", **keys)
    assert single == 20 * [1] and taken == 4 * [4, 1]
    assert_same_run(one, four)
    assert_same_rows(directory / "1", directory / "4")
    assert len(read_metrics(directory / "4")) == 4
    return four


@pytest.mark.slow
def test_what_the_draw_of_t_remembers_passes_from_step_to_step_of_a_call(run, tmp_path, monkeypatch):
    # In a lottery of 2^30 tickets a rounding of a loss changes all that is drawn afterwards; in one of 64 it does not.
    monkeypatch.setattr(timesteps, "TICKETS", 64)
    keys = {"objective__timesteps": "loss_aware(history_length=2)", "schedule__num_steps": 4}
    state = assert_calls_of_four_are_single_steps(run, tmp_path, **keys)
    assert state.timesteps.counts.sum() == 20 * 16 and state.timesteps.counts.min() >= 2
    assert np.ptp(state.timesteps.counts) > 0.2 * 80  # it is drawn by loss: uniformly, √(80 · 3/4) ≈ 8 apart


def test_a_bad_update_inside_a_call_is_left_out_alone(run, tmp_path, monkeypatch):
    # The monitored loss is of the poisoned t as well, so it is told another one.
    other_t = loop.timesteps.low_discrepancy()._replace(
        draw=lambda memory, key, n, num_steps: (jnp.full(n, 20), jnp.ones(n))
    )
    monkeypatch.setattr(loop.timesteps, "low_discrepancy", lambda at_1: other_t)
    keys = {"train__skip_nonfinite": 20, "model__network": "layer(poison=7.0)"}
    state = assert_calls_of_four_are_single_steps(run, tmp_path, **keys)
    assert 2 <= state.window["skipped"] <= 18
    assert int(state.opt_state[-1][0].count) == 20 - state.window["skipped"]

    messages = []  # where there are too many, they name the first of the steps that is bad
    for steps_per_call in (1, 4):
        with pytest.raises(FloatingPointError, match="is NaN or Inf at t = 8") as raised:
            run(steps_per_call, tmp_path / f"fewer_{steps_per_call}", **keys | {"train__skip_nonfinite": 1})
        messages.append(str(raised.value).partition("; norms of the parameters")[0])
    assert messages[0] == messages[1]


def test_a_learned_schedule_is_trained_inside_a_call(run, tmp_path):
    keys = {"schedule__name": "learned(start='cosine', inner='second_moment')"}
    state = assert_calls_of_four_are_single_steps(run, tmp_path, **keys)
    assert {"schedule", "pixel", "time"} >= set(state.params) > {"pixel", "time"}


def test_a_signal_stops_at_a_call_s_end_and_the_run_goes_on_as_if_it_had_not_come(run, straight, tmp_path, monkeypatch):
    toy.interrupt(monkeypatch, (6,), stop)  # in the call of the steps 6 to 9
    with pytest.raises(Preempted) as stopped:
        run(4, tmp_path / "stopped")
    assert "at step 9, which is saved" in stopped.value.reason
    state, taken = run(4, tmp_path / "stopped")
    assert taken == [1, 4, 1, 4, 1]
    assert tree_sha256(state) == tree_sha256(straight[1])
    assert_same_rows(tmp_path / "stopped", straight[0])


def val_losses(directory):
    return {row["step"]: row["val_loss"] for row in read_metrics(directory) if "val_loss" in row}


@pytest.fixture
def logged(monkeypatch):
    """The loggers "kept(name=...)" and "broken": how the first was made, and the rows that it gets by their steps."""
    made, rows = [], {}

    def kept(directory, step, config, name: str):
        made.append((directory, step, config["train"]["loggers"], name))
        return Logger(rows.__setitem__)

    def broken(directory, step, config):
        raise ConnectionError("no route to host")

    for maker in (kept, broken):
        monkeypatch.setitem(loggers.LOGGERS, maker.__name__, maker)
    return made, rows


def test_validation_at_its_own_interval_and_loggers_change_nothing_else_also_after_a_signal(
    run, straight, logged, tmp_path, monkeypatch, caplog
):
    keys = {"train__validate_every": 5, "train__loggers": ("broken", "kept(name='mine')")}
    toy.interrupt(monkeypatch, (6,), stop)  # in the call of the steps 6 to 9
    with pytest.raises(Preempted):
        run(4, tmp_path, **keys)
    state, _ = run(4, tmp_path, **keys)
    assert tree_sha256(state) == tree_sha256(straight[1])
    made, rows = logged
    assert made == [(tmp_path, step, keys["train__loggers"], "mine") for step in (0, 9)]
    assert [{"step": step} | row for step, row in rows.items()] == read_metrics(tmp_path)
    assert caplog.text.count("the logger broken failed (ConnectionError: no route to host)") == 2  # once a leg
    found, at_checkpoints = val_losses(tmp_path), val_losses(straight[0])
    assert list(found) == [5, 10, 15, 20] and list(at_checkpoints) == [10, 20]
    assert {step: found[step] for step in at_checkpoints} == at_checkpoints
    assert {row["validation_images"] for row in read_metrics(tmp_path)} == {64}


def test_a_checkpoint_is_ranked_by_the_validation_loss_of_its_own_step(run, tmp_path, monkeypatch):
    ranked, save = {}, Checkpoints.save

    def noted(checkpoints, step, state, metrics):
        ranked[step] = metrics["val_loss"]
        save(checkpoints, step, state, metrics)

    monkeypatch.setattr(Checkpoints, "save", noted)
    keys = {"train__num_steps": 6, "train__log_every": 4, "train__checkpoint_every": 3, "train__validate_every": 2}
    run(1, tmp_path, **keys)
    found = val_losses(tmp_path)
    assert list(found) == [2, 3, 4, 6] and [row["step"] for row in read_metrics(tmp_path)] == [2, 3, 4, 6]
    assert ranked == {step: found[step] for step in (3, 6)}


def test_a_run_from_disk_is_the_run_from_the_devices_also_after_a_signal(run, straight, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "resident", None)
    toy.interrupt(monkeypatch, (6,), stop)
    with pytest.raises(Preempted):
        run(4, tmp_path / "disk", data__placement="disk")
    state, _ = run(4, tmp_path / "disk", data__placement="disk")
    assert tree_sha256(state) == tree_sha256(straight[1])
    assert_same_rows(tmp_path / "disk", straight[0])


def test_a_batch_that_cannot_be_read_ends_the_run_with_the_disk_s_own_words(run, tmp_path, monkeypatch):
    def fail(source, indices):
        raise OSError(5, "Input/output error", "decoded-train.npy")

    monkeypatch.setattr(Source, "images", fail)
    monkeypatch.setattr(loop, "monitor", lambda *args: lambda params: 0.0)
    with pytest.raises(OSError, match="Input/output error: 'decoded-train.npy'"):
        run(4, tmp_path, data__placement="disk")


def test_a_run_from_a_cpu_that_goes_on_in_the_middle_of_a_call(run, straight, tmp_path, monkeypatch):
    toy.interrupt(monkeypatch, (6,), stop)
    with pytest.raises(Preempted):
        run(1, tmp_path / "stopped")
    state, taken = run(4, tmp_path / "stopped")
    assert taken == [1, 1, 1, 4, 1, 4, 1]
    assert_same_run(straight[1], state)
    assert_same_rows(straight[0], tmp_path / "stopped")


def test_calls_of_unlike_lengths_are_not_timed_as_one_kind(run, taken, tmp_path, monkeypatch):
    timed = []

    class Recorded:
        def __init__(self):
            self.lengths = []
            timed.append(self.lengths)

        @contextlib.contextmanager
        def step(self):
            yield
            self.lengths.append(taken[-1])

    monkeypatch.setattr(loop, "Watchdog", Recorded)
    run(4, tmp_path)
    assert taken == 4 * [4, 1]
    assert sorted(timed) == [4 * [1], 4 * [4]]
