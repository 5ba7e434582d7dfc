"""Several steps per compiled call are the same steps, and no call crosses a step after which something happens."""

import contextlib
import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from diffusion import data, timesteps
from diffusion.data import Source
from diffusion.experiment import build
from diffusion.reporting import loggers
from diffusion.reporting.metrics_log import Logger, MetricsLog, read_metrics
from diffusion.reporting.progress import Progress
from diffusion.runtime.checkpoint import Checkpoints
from diffusion.runtime.devices import Replicated
from diffusion.runtime.digests import named_leaves, tree_sha256
from diffusion.runtime.preemption import Preempted, Preemption
from diffusion.training import clock, loop, parallel

pytestmark = pytest.mark.usefixtures("steps_compiled_once")

EVERY = ("checkpoint_every", "validate_every", "sample_every", "quality_every", "check_replicas_every")


def plan(**changes):
    never = dict.fromkeys(EVERY, 0)
    return loop.Plan(**never | {"seed": 0, "num_steps": 1000, "steps_per_call": 10, "skip_nonfinite": 0} | changes)


def calls(made, begin=0, log_every=0):
    return list(loop._calls(made, log_every, begin, batch_size=4, num_examples=7))


def lengths(made, begin=0, log_every=0):
    return [len(steps) for steps, _ in calls(made, begin, log_every)]


# --- which calls a run makes


def test_what_is_left_before_something_happens_is_made_of_single_steps():
    assert lengths(plan(num_steps=198), log_every=99) == 2 * (9 * [10] + 9 * [1])


def test_a_call_is_no_longer_than_the_shortest_interval():
    assert lengths(plan(num_steps=100, checkpoint_every=50), log_every=5) == 20 * [5]
    assert lengths(plan(num_steps=7)) == [7]


def test_after_a_resume_at_an_odd_step_the_next_interval_has_full_calls():
    assert lengths(plan(num_steps=200), begin=37, log_every=100) == 6 * [10] + 3 * [1] + 10 * [10]
    assert lengths(plan(num_steps=30), begin=7, log_every=10) == 3 * [1] + 2 * [10]


def test_calls_hold_every_step_once_and_cross_no_event():
    rng = np.random.default_rng(0)
    for _ in range(200):
        log_every, drawn = int(rng.integers(1, 30)), {name: int(rng.integers(0, 30)) for name in EVERY}
        made = plan(num_steps=int(rng.integers(1, 120)), steps_per_call=int(rng.integers(1, 20)), **drawn)
        begin = int(rng.integers(made.num_steps))
        found = calls(made, begin, log_every)
        assert [step for steps, _ in found for step in steps] == list(range(begin + 1, made.num_steps + 1))
        intervals = [log_every, *filter(None, drawn.values())]
        longest = min(made.steps_per_call, made.num_steps, *intervals)
        assert {len(steps) for steps, _ in found} <= {1, longest}
        for steps, indices in found:
            assert not any(step % every == 0 for step in steps[:-1] for every in intervals)
            wanted = [data.batch_indices(made.seed, step - 1, 4, 7) for step in steps]
            np.testing.assert_array_equal(indices, wanted)
        # A run that was stopped after a call makes the others as if it had not been.
        stopped_at = found[len(found) // 2][0][-1]
        assert lengths(made, stopped_at, log_every) == [len(steps) for steps, _ in found if steps[0] > stopped_at]


@pytest.mark.parametrize(("on_cpu", "steps_per_call"), [(True, 1), (False, 7)])
def test_on_cpus_alone_a_call_has_one_step(on_cpu, steps_per_call, monkeypatch):
    monkeypatch.setattr(build, "runs_on_cpu", lambda: on_cpu)
    assert build.plan(toy.config(train__steps_per_call=7)).steps_per_call == steps_per_call


# --- whole runs


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
    monkeypatch.setattr(loop.timesteps, "low_discrepancy", lambda: other_t)
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


def test_scoring_takes_no_time_from_the_speed_of_training(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    measured = clock.Clock(batch_size=8, step=10)
    for step, seconds in ((13, 2.0), (14, 0.5)):
        with measured.stopped():
            now[0] += 100.0
        now[0] += seconds
        assert measured.lap(step) == {"images_per_second": {13: 3 * 8 / 2.0, 14: 8 / 0.5}[step]}


def test_compiling_takes_no_time_from_the_speed_of_training_nor_do_its_steps_count(monkeypatch):
    """A call takes 100 s at first and 1 s a step later; on an accelerator it returns before its steps are computed."""
    now, done = [0.0], [0.0]  # the time, and when what was started is computed
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Replicated, "wait", lambda metrics: now.__setitem__(0, max(now[0], metrics.leaves)))
    measured, speeds, before, compiled = clock.Clock(batch_size=8, step=0), [], None, set()

    def train_steps(state, batch):
        length = len(batch.indices)
        now[0] += 0.0 if length in compiled else 100.0
        compiled.add(length)
        done[0] = max(now[0], done[0]) + length
        return state, Replicated(done[0])

    with Progress(9) as progress:
        for step, length in ((1, 1), (2, 1), (4, 2), (6, 2), (7, 1), (9, 2)):
            batch = parallel.Batch(jnp.zeros(1), None, jnp.zeros(length))
            _, metrics = loop._called(train_steps, Replicated(0), batch, length, before, progress, measured)
            if before is not None:
                before.wait()
            before = metrics
            if step in (1, 4, 9):
                before.wait()
                speeds.append(measured.lap(step))
    assert speeds == [{}, {"images_per_second": 8.0}, {"images_per_second": 8.0}]


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


def test_what_is_monitored_shown_and_ranked_is_the_ema_and_all_of_the_state_is_saved(tmp_path):
    keys = {"train__num_steps": 4, "train__checkpoint_every": 2, "train__sample_every": 2, "train__log_every": 2}
    keys |= {"quality__every": 3}
    made = toy.experiment(**keys, objective__timesteps="loss_aware(history_length=1)", schedule__num_steps=2)
    monitored, shown, measured = [], [], []

    def monitor(params):
        monitored.append(params.host())
        return {"val_loss": 1.0}

    def draw(step, params, stops, only_missing):
        shown.append(params.host())
        return True

    def quality(params, stops):
        measured.append(params.host())
        return {"fid": float(len(measured))}

    def never(step):
        return False

    start, plan = jax.device_get(made.initial_state()), build.plan(made.config)
    with Checkpoints(tmp_path) as checkpoints, MetricsLog(tmp_path) as log, Preemption() as preemption:
        given = made.training, plan, start, toy.source("train"), True, monitor, never, draw, quality
        end = loop.train(*given, checkpoints, log, preemption)
        saved = [checkpoints.restore(step, made.abstract_state()) for step in (2, 4)]
    assert tree_sha256(saved[1]) == tree_sha256(end)
    assert end.timesteps.counts.sum() == 4 * 16 and saved[0].timesteps.counts.sum() == 2 * 16
    assert [tree_sha256(params) for params in monitored] == [tree_sha256(state.ema_params) for state in saved]
    assert [tree_sha256(params) for params in shown] == [tree_sha256(saved[0].ema_params)]
    assert tree_sha256(end.ema_params) != tree_sha256(end.params)
    # After every third step and at the end, in the step's row.
    assert {row["step"]: row["fid"] for row in read_metrics(tmp_path) if "fid" in row} == {3: 1.0, 4: 2.0}
    assert tree_sha256(measured[1]) == tree_sha256(end.ema_params) != tree_sha256(measured[0])


def test_a_signal_that_stops_the_samples_metrics_saves_and_the_resumed_run_writes_the_same_row(tmp_path):
    """Metrics of samples after step 2 of 4; the row of that step has the loss, too."""
    keys = {"train__num_steps": 4, "train__checkpoint_every": 4, "train__sample_every": 0, "train__log_every": 2}
    made = toy.experiment(**keys, quality__every=2, schedule__num_steps=2)
    start, plan = jax.device_get(made.initial_state()), build.plan(made.config)
    train_steps = parallel.train_steps(made.training, plan.seed)  # compiled once

    def never(step):
        return False

    def drawn(*_):
        return True

    def run(directory, state, sends):
        def quality(params, stops):
            if sends:
                os.kill(os.getpid(), signal.SIGTERM)
            return None if stops() else {"fid": float(np.abs(jax.tree.leaves(params.host())[0]).sum())}

        with (
            pytest.MonkeyPatch.context() as patch,
            Checkpoints(directory) as checkpoints,
            MetricsLog(directory, int(state.step)) as log,
            Preemption() as preemption,
        ):
            patch.setattr(parallel, "train_steps", lambda *_: train_steps)
            given = made.training, plan, state, toy.source("train"), True, lambda params: {"val_loss": 1.0}
            return loop.train(*given, never, drawn, quality, checkpoints, log, preemption)

    end = run(tmp_path / "straight", start, False)
    with pytest.raises(Preempted, match="75"):
        run(tmp_path / "stopped", start, True)
    assert read_metrics(tmp_path / "stopped") == []
    with Checkpoints(tmp_path / "stopped") as checkpoints:
        saved = checkpoints.restore(2, made.abstract_state())
    assert tree_sha256(run(tmp_path / "stopped", saved, False)) == tree_sha256(end)
    rows = [
        [{key: value for key, value in row.items() if key != "images_per_second"} for row in read_metrics(directory)]
        for directory in (tmp_path / "straight", tmp_path / "stopped")
    ]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == [2, 4] and all("fid" in row for row in rows[0])
