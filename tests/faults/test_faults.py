"""Runs that are interrupted, whose numbers become NaN or Inf, or whose devices disagree or fail."""

import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from diffusion import timesteps
from diffusion.evaluation import sampling
from diffusion.experiment import memory
from diffusion.reporting import metrics_log
from diffusion.runtime import devices, randomness
from diffusion.runtime import preemption as preemption_lib
from diffusion.runtime.checkpoint import Checkpoints
from diffusion.runtime.devices import Replicated
from diffusion.runtime.digests import tree_sha256
from diffusion.runtime.preemption import Preempted
from diffusion.training import loop, parallel

pytestmark = pytest.mark.usefixtures("steps_compiled_once")

POISONED = "layer(poison=7.0)"  # network_t = 7 is t = 8
POISONED_T = 8
ADM = "adm(channels=4, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=2, num_heads=1)"


def rows_without_time(directory):
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in metrics_log.read_metrics(directory)]


@pytest.fixture(scope="module")
def straight(steps_compiled_once, tmp_path_factory):
    directory = tmp_path_factory.mktemp("straight")
    return directory, toy.run(toy.experiment(), directory)


def test_a_signal_saves_within_one_step_and_the_run_ends_where_it_would_have_ended(straight, tmp_path, monkeypatch):
    numbers = iter([signal.SIGTERM, signal.SIGINT])
    toy.interrupt(monkeypatch, (3, 13), lambda: os.kill(os.getpid(), next(numbers)))
    for stopped_at in (4, 14):  # the step that was about to begin is still taken
        with pytest.raises(Preempted, match="75") as stop:
            toy.run(toy.experiment(), tmp_path)
        assert stop.value.code == preemption_lib.EXIT_CODE == 75
        assert f"at step {stopped_at}, which is saved" in stop.value.reason
    state = toy.run(toy.experiment(), tmp_path)
    assert tree_sha256(state) == tree_sha256(straight[1])
    assert rows_without_time(tmp_path) == rows_without_time(straight[0])
    assert [row["step"] for row in rows_without_time(tmp_path)] == [5, 10, 15, 20, 25, 30]


def test_a_row_is_the_mean_of_the_steps_since_the_row_before(straight, tmp_path):
    toy.run(toy.experiment(train__log_every=1), tmp_path)
    of_steps = rows_without_time(tmp_path)
    for row in rows_without_time(straight[0]):
        since = of_steps[row["step"] - 5 : row["step"]]
        assert [one["step"] for one in since] == list(range(row["step"] - 4, row["step"] + 1))
        for name in ("loss", "vlb_bpd", "grad_norm"):
            np.testing.assert_allclose(row[name], np.mean([one[name] for one in since]), rtol=1e-5)


def test_a_signal_that_comes_with_the_last_step_is_handled_after_it(tmp_path, monkeypatch, straight):
    toy.interrupt(monkeypatch, (29,), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted):
        toy.run(toy.experiment(), tmp_path)
    assert tree_sha256(toy.run(toy.experiment(), tmp_path)) == tree_sha256(straight[1])


def test_samples_are_drawn_after_the_save_and_those_that_a_signal_stopped_when_the_run_goes_on(
    tmp_path, monkeypatch, straight
):
    drawn, saved, before, save = [], [], [], Checkpoints.save

    def noted(checkpoints, step, state, metrics):
        saved.append(step)
        save(checkpoints, step, state, metrics)

    class Drawn(sampling.Sampler):
        """Draws two batches, and notes which are drawn and what was saved before."""

        def __init__(self):
            """It needs nothing."""

        def batches(self, model, num_images):
            before.append(list(saved))
            for number in range(2):
                drawn.append(number)
                if len(drawn) in (3, 5):  # with the first batch of the second call, and with the last of the third
                    signal.raise_signal(signal.SIGTERM)  # in this thread, so that it is there at once
                yield np.arange(num_images // 2), np.zeros((num_images // 2, *toy.SHAPE), np.uint8)

    monkeypatch.setattr(Checkpoints, "save", noted)
    monkeypatch.setattr(toy.sample, "make_sampler", lambda experiment: Drawn())
    monkeypatch.setattr(toy.train.page, "refresh", lambda directory: None)
    monkeypatch.setattr(toy.train.plots, "plot_loss", lambda rows, path: None)
    experiment = toy.experiment(train__sample_every=10, sample__num_images=4)
    pictures = [tmp_path / f"samples_{step}.png" for step in (10, 20, 30)]
    with pytest.raises(Preempted, match="75") as stop:
        toy.run(experiment, tmp_path)
    assert "at step 20, which is saved" in stop.value.reason and drawn == [0, 1, 0]
    assert [path.exists() for path in pictures] == [True, False, False]
    assert before == [[10], [10, 20]]
    with pytest.raises(Preempted):  # the signal came with the last batch, so the next step is the last one
        toy.run(experiment, tmp_path)
    assert [path.exists() for path in pictures] == [True, True, False] and drawn == [0, 1, 0, 0, 1]
    state = toy.run(experiment, tmp_path)
    assert drawn == [0, 1, 0, 0, 1] and tree_sha256(state) == tree_sha256(straight[1])
    assert rows_without_time(tmp_path) == rows_without_time(straight[0])


def test_the_last_save_is_done_before_a_signal_can_break_it_off(tmp_path, monkeypatch):
    saving, close = [], Checkpoints.close

    def closed(checkpoints):
        saving.append(checkpoints._manager.is_saving_in_progress())
        close(checkpoints)

    monkeypatch.setattr(Checkpoints, "close", closed)
    toy.run(toy.experiment(), tmp_path)
    assert saving == [False]


def poisoned_steps(num_steps):
    """The steps (from 1) in which t = 8 is drawn, from the seed alone."""
    settings, found = toy.config(), []
    for step in range(num_steps):
        step_key = jax.random.fold_in(randomness.stream(settings.seed, "train"), step)
        sampler = timesteps.SAMPLERS[settings.objective.timesteps]()
        t, _ = sampler.draw((), randomness.of_step(step_key).t, settings.train.batch_size, 50)
        if POISONED_T in np.asarray(t):
            found.append(step + 1)
    return found


def test_a_loss_that_is_nan_stops_the_run_and_says_where(tmp_path):
    first = poisoned_steps(30)[0]
    with pytest.raises(FloatingPointError) as raised:
        toy.run(toy.experiment(model__network=POISONED), tmp_path)
    message = str(raised.value)
    assert message.startswith(f"step {first}: ") and "grad_norm = nan, loss = nan, vlb_bpd = nan;" in message
    assert f"the loss is NaN or Inf at t = {POISONED_T};" in message and "\n" not in message
    of_parameters = rf"norms of the parameters before step {first}: pixel \d[\d.]*, time \d[\d.]*; "
    assert re.search(of_parameters + "norms of the gradient: pixel nan", message)
    steps = [int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*")]
    assert all(step < first for step in steps)


def test_bad_updates_are_left_out_counted_and_resumed_over(tmp_path, monkeypatch):
    bad = poisoned_steps(30)
    assert 3 <= len(bad) < 25
    settings = {"train__skip_nonfinite": len(bad), "model__network": POISONED}
    # The monitored loss is of t = 8 as well, so it is told another one.
    other_t = timesteps.low_discrepancy()._replace(
        draw=lambda memory, key, n, num_steps: (jnp.full(n, 20), jnp.ones(n))
    )
    monkeypatch.setattr(loop.timesteps, "low_discrepancy", lambda at_1: other_t)
    state = toy.run(toy.experiment(**settings), tmp_path / "straight")
    assert int(state.step) == 30 and int(state.opt_state[-1][0].count) == 30 - len(bad)
    rows = rows_without_time(tmp_path / "straight")
    assert [row["skipped"] for row in rows] == [sum(step <= row["step"] for step in bad) for row in rows]
    assert all(np.isfinite(list(row.values())).all() for row in rows)

    toy.interrupt(monkeypatch, (bad[1],), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted):
        toy.run(toy.experiment(**settings), tmp_path / "resumed")
    again = toy.run(toy.experiment(**settings), tmp_path / "resumed")
    assert tree_sha256(again) == tree_sha256(state)
    assert rows_without_time(tmp_path / "resumed") == rows

    fewer = settings | {"train__skip_nonfinite": len(bad) - 1}
    with pytest.raises(
        FloatingPointError, match=f"{len(bad)} updates were left out, train.skip_nonfinite={len(bad) - 1}"
    ):
        toy.run(toy.experiment(**fewer), tmp_path / "fewer")


def test_a_bad_step_changes_nothing_but_the_count_of_steps():
    experiment, first = toy.experiment(model__network=POISONED, train__skip_nonfinite=99), poisoned_steps(30)[0]
    start = jax.device_get(experiment.initial_state())
    train_steps = parallel.train_steps(experiment.training, experiment.config.seed)
    batch = parallel.resident(toy.source("train"))(np.arange(16, dtype=np.int32)[None])
    bad = start.replace(step=np.int32(first - 1))
    after = train_steps(devices.replicate(bad), batch)[0].host()
    assert after.step == first and after.window["skipped"] == 1 and after.window["count"] == 0
    unchanged = {name: getattr(after, name) for name in ("params", "ema_params", "opt_state", "timesteps")}
    assert tree_sha256(unchanged) == tree_sha256({name: getattr(bad, name) for name in unchanged})


def test_a_replica_with_one_flipped_bit_is_found_and_named(tmp_path):
    experiment = toy.experiment()
    state = jax.device_get(experiment.initial_state())
    names = parallel.differing_replicas()
    replicated = devices.replicate(state)
    assert names(replicated) == []
    rng = np.random.default_rng(0)
    for name in ("pixel", "time"):
        params = replicated.leaves.params
        copies = np.array(params[name]["kernel"])
        bits = copies.view(np.uint32)
        bits[rng.integers(1, 8), 0, rng.integers(2)] ^= np.uint32(1) << np.uint32(rng.integers(32))
        changed = params[name] | {"kernel": jax.device_put(copies, params[name]["kernel"].sharding)}
        state = replicated.leaves.replace(params=params | {name: changed})
        assert names(Replicated(state)) == [f"params/{name}/kernel"]


def test_replicas_that_differ_stop_the_run_before_the_next_checkpoint(tmp_path, monkeypatch):
    found = iter([[], ["params/pixel/kernel"]])
    monkeypatch.setattr(parallel, "differing_replicas", lambda: lambda state: next(found))
    with pytest.raises(RuntimeError, match="step 20: the devices no longer hold the same state, params/pixel/kernel"):
        toy.run(toy.experiment(), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")] == ["10"]


@pytest.mark.parametrize(
    ("network", "advice"), [("unet", "unet.remat=True, or train"), ("layer", "train"), (ADM, "train")]
)
def test_too_little_memory_is_a_one_line_error_that_names_the_keys(network, advice):
    experiment = toy.experiment(model__network=network)
    words = (
        r"train.batch_size=16 is 2 images per device at a time, which keep about \d\.\d\d GiB .* "
        rf"set {advice}.grad_accum higher, or train.batch_size lower"
    )
    with pytest.raises(MemoryError, match=words):
        with memory.shortage_explained(experiment):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        with memory.shortage_explained(experiment):
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")
