"""The loop's calls: which ones a run makes, their timing, and what they show, rank and save."""

import dataclasses
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from diffusion import data
from diffusion.experiment import build
from diffusion.programs import in_training, train
from diffusion.reporting.metrics_log import MetricsLog, read_metrics
from diffusion.reporting.progress import Progress
from diffusion.runtime import processes
from diffusion.runtime.checkpoint import Checkpoints
from diffusion.runtime.devices import Replicated
from diffusion.runtime.digests import tree_sha256
from diffusion.runtime.preemption import Preempted, Preemption
from diffusion.training import checks, clock, loop, parallel

pytestmark = pytest.mark.usefixtures("steps_compiled_once")

EVERY = ("checkpoint_every", "validate_every", "sample_every", "quality_every", "check_replicas_every")


def plan(**changes):
    never = dict.fromkeys(EVERY, 0)
    return loop.Plan(**never | {"seed": 0, "num_steps": 1000, "steps_per_call": 10, "skip_nonfinite": 0} | changes)


def calls(made, begin=0, log_every=0):
    return list(loop._calls(made, log_every, begin, batch_size=4, num_examples=7))


def lengths(made, begin=0, log_every=0):
    return [len(steps) for steps, _ in calls(made, begin, log_every)]


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
    """Metrics of samples after steps 2 and 4, the last one, whose row has the loss, too.

    The losses are checked before, because a step that a signal stops is saved.
    """
    keys = {"train__num_steps": 4, "train__checkpoint_every": 4, "train__sample_every": 0, "train__log_every": 4}
    made = toy.experiment(**keys, quality__every=2, schedule__num_steps=2)
    start, plan = jax.device_get(made.initial_state()), build.plan(made.config)
    train_steps = parallel.train_steps(made.training, plan.seed)  # compiled once

    def never(step):
        return False

    def drawn(*_):
        return True

    def run(directory, state, at=None, plan=plan):
        steps, finite = iter(range(int(state.step) or 2, 5, 2)), checks.finite
        checked = {int(state.step)}

        def check(unchecked, *rest):
            checked.update(step for steps, _ in unchecked for step in steps)
            finite(unchecked, *rest)

        def quality(params, stops):
            step = next(steps)
            assert step in checked
            if step == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return None if stops() else {"fid": float(np.abs(jax.tree.leaves(params.host())[0]).sum())}

        with (
            pytest.MonkeyPatch.context() as patch,
            Checkpoints(directory) as checkpoints,
            MetricsLog(directory, int(state.step)) as log,
            Preemption() as preemption,
        ):
            patch.setattr(parallel, "train_steps", lambda *_: train_steps)
            patch.setattr(checks, "finite", check)
            given = made.training, plan, state, toy.source("train"), True, lambda params: {"val_loss": 1.0}
            return loop.train(*given, never, drawn, quality, checkpoints, log, preemption)

    def rows(name):
        return [row | {"images_per_second": 0} for row in read_metrics(tmp_path / name)]

    end, wanted = run(tmp_path / "straight", start), rows("straight")
    assert [row["step"] for row in wanted] == [2, 4] and all("fid" in row for row in wanted)
    for at in (2, 4):
        directory = tmp_path / f"stopped{at}"
        with pytest.raises(Preempted, match="75"):
            run(directory, start, at)
        assert rows(directory.name) == wanted[: at // 2 - 1]
        with Checkpoints(directory) as checkpoints:
            saved = checkpoints.restore(at, made.abstract_state())
        with Checkpoints(tmp_path / f"again{at}") as checkpoints:
            checkpoints.save(at, saved, {})
        shutil.copy(directory / "metrics.jsonl", tmp_path / f"again{at}")
        assert tree_sha256(run(directory, saved)) == tree_sha256(end)
        assert rows(directory.name) == wanted
        run(tmp_path / f"again{at}", saved, plan=dataclasses.replace(plan, quality_every=0))  # without what was stopped
        unmeasured = [{name: value for name, value in row.items() if name != "fid"} for row in wanted]
        assert rows(f"again{at}")[-1] == unmeasured[-1]


def test_a_process_that_resumes_with_others_does_not_begin_anew(tmp_path, monkeypatch):
    """Only process 0 read the checkpoint; the weights from which the run began may be gone by now."""
    monkeypatch.setattr(build.Experiment, "initial_state", lambda _: pytest.fail("it began anew"))
    monkeypatch.setattr(processes, "on_first", lambda make: None)
    monkeypatch.setattr(processes, "bool_from_first", lambda value: False)
    monkeypatch.setattr(processes, "from_first", lambda tree: tree)
    made = toy.experiment()
    with Checkpoints(tmp_path) as checkpoints:
        found, like = train.resume(made, checkpoints), made.abstract_state()
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), found) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), like
    )


def test_a_run_at_its_last_step_goes_on_only_if_what_was_measured_of_its_samples_has_no_row(tmp_path):
    plan = build.plan(toy.config(train__num_steps=4, quality__every=2))
    assert not train._is_trained(plan, 2, tmp_path)
    with MetricsLog(tmp_path) as log:
        for step, is_trained in ((2, False), (4, True)):
            log.write(step, loss=1.0)
            assert train._is_trained(plan, 4, tmp_path) == is_trained
    unmeasured = build.plan(toy.config(train__num_steps=4))
    assert train._is_trained(unmeasured, 4, tmp_path / "elsewhere")
    with MetricsLog(tmp_path / "another") as log:
        log.write(2, loss=1.0)
    assert not train._is_trained(unmeasured, 4, tmp_path / "another")  # stopped while it measured samples


def test_a_signal_stops_the_features_of_samples_between_two_parts(monkeypatch):
    """Of 5 images in parts of 2: after the first part, or not at all."""
    monkeypatch.setattr(in_training, "BATCH_SIZE", 2)
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
    parts = in_training._parts(images)
    assert [part.ravel().tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    asked, seen = iter([False, True]), []

    def measure(parts):
        seen.extend(len(part) for part in parts)

    with pytest.raises(processes.Stopped):
        processes.on_first_in_parts(measure, in_training._parts(images), lambda: next(asked))
    assert seen == [2]
