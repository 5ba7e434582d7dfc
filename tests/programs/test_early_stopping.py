"""Training stops after train.patience validations without a lower val_loss, at the same step if it was killed."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import toy

from diffusion import data
from diffusion.data import validation
from diffusion.experiment import build, rules, workdir
from diffusion.programs import early_stopping, evaluate, fork, sample, train
from diffusion.reporting import page, plots
from diffusion.reporting.metrics_log import read_metrics
from diffusion.runtime import processes
from diffusion.runtime.checkpoint import Checkpoints
from diffusion.runtime.digests import tree_sha256
from diffusion.training import loop, parallel

LAST = 30  # train.num_steps
# So high a learning rate that val_loss rises now and then.
KEYS = {
    "train__num_steps": LAST, "train__checkpoint_every": 4, "train__validate_every": 2, "train__log_every": 3,
    "optim__decay": "constant", "optim__learning_rate": 2.0, "data__validation": 8, "train__patience": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(steps_compiled_once):
    """Whole runs of the toy, neither sampled nor scored, which share all that is traced: (directory, keys)."""
    made, monitor = toy.experiment(**KEYS), []
    abstract, start, make_monitor = made.abstract_state(), jax.device_get(made.initial_state()), loop.monitor

    def monitor_once(*given):
        monitor.extend([] if monitor else [make_monitor(*given)])
        return monitor[0]

    def score(experiment, directory, model, state, *_):
        return {"protocol": {}, "test_bpd": 1.0, "step": int(state.step)}

    def run(directory, forked="", **keys):
        train.run(toy.config(**KEYS | keys), directory, forked=str(forked))
        return json.loads((directory / "summary.json").read_text())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "experiment", lambda config, *_: dataclasses.replace(made, config=config))
        patch.setattr(build.Experiment, "abstract_state", lambda _: abstract)
        patch.setattr(build.Experiment, "initial_state", lambda _: start)
        patch.setattr(loop, "monitor", monitor_once)
        patch.setattr(data, "load", toy.load)
        patch.setattr(data, "describe", toy.describe)
        for module, name in ((sample, "save"), (plots, "plot_loss"), (page, "refresh")):
            patch.setattr(module, name, lambda *_: None)
        patch.setattr(evaluate, "score_run", score)
        yield run


@pytest.fixture(scope="module")
def stopped(runs, tmp_path_factory):
    """The directory of a run that was never killed and stopped early, and its summary. Do not write into it."""
    directory = tmp_path_factory.mktemp("stopped")
    return directory, runs(directory)


@pytest.fixture(scope="module")
def endless(runs, tmp_path_factory):
    """The directory of the run without patience, and its summary."""
    directory = tmp_path_factory.mktemp("endless")
    return directory, runs(directory, train__patience=0)


@pytest.fixture
def copy(stopped, tmp_path):
    return shutil.copytree(stopped[0], tmp_path / "copy")


def rows_of(directory):
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in read_metrics(directory)]


def state_of(directory):
    with Checkpoints(directory / "checkpoints") as checkpoints:
        return checkpoints.restore(None, toy.experiment(**KEYS).abstract_state())


def test_it_stops_at_the_first_step_where_the_patience_is_over(stopped, endless):
    directory, summary = stopped
    losses = {row["step"]: row["val_loss"] for row in read_metrics(endless[0]) if "val_loss" in row}
    steps = list(losses)
    first = next(
        step
        for i, step in enumerate(steps)
        if i >= 2 and min(losses[steps[i - 1]], losses[step]) >= min(losses[s] for s in steps[: i - 1])
    )
    assert 4 < first < LAST and first % KEYS["train__checkpoint_every"]  # no checkpoint would be due
    assert summary["step"] == first == int(state_of(directory).step)
    lowest = min((step for step in steps if step <= first), key=losses.get)
    of_stop = {"validations": 2, "lowest_val_loss": losses[lowest], "lowest_at_step": lowest}
    assert summary["stopped_early"] == of_stop and "stopped_early" not in endless[1]
    # Until then it is the run without patience.
    until = [row for row in rows_of(endless[0]) if row["step"] <= first]
    assert rows_of(directory) == until


def test_a_run_that_was_killed_stops_at_the_same_step_with_the_same_bits(runs, stopped, tmp_path, monkeypatch):
    """Before its first checkpoint, before the step where it stops, and after it, where nothing is left to train."""

    def kill(*_):
        raise KeyboardInterrupt

    for at in (3, stopped[1]["step"] - 1):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            toy.interrupt(patched, (at,), kill)
            runs(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sample, "save", kill)
        runs(tmp_path)
    assert not workdir.is_finished(tmp_path)
    monkeypatch.setattr(parallel, "train_steps", None)
    summary = runs(tmp_path)
    assert tree_sha256(state_of(tmp_path)) == tree_sha256(state_of(stopped[0]))
    assert rows_of(tmp_path) == rows_of(stopped[0])
    assert {**summary, "seconds": 0} == {**stopped[1], "seconds": 0}


def test_it_says_so_and_the_same_command_does_nothing(runs, copy, stopped, monkeypatch, capsys):
    step = stopped[1]["step"]
    monkeypatch.setattr(train, "train", None)
    for keys in ({}, {"train__num_steps": LAST + 1}, {"train__patience": 1}):
        assert runs(copy, **keys) == stopped[1]
    said = capsys.readouterr().out.splitlines()
    ends = f"stopped early at step {step}, after 2 validations without a lower val_loss"
    assert [line.split(": see")[0] for line in said] == 3 * [f"{copy} holds this run, {ends}"]
    assert train._last_words(stopped[1]).endswith(f"test 1.0000 bits/dim; {ends}")
    words = train._last_words(stopped[1] | {"test_bpd_sampling_stderr": 0.0125})
    assert "1.0000 bits/dim, an estimate, standard error 0.013 against the sum of all terms;" in words


def test_with_more_patience_it_goes_on_and_without_any_to_the_end_as_if_it_had_not_stopped(
    runs, copy, stopped, endless
):
    longer = runs(copy, train__patience=4)
    assert stopped[1]["step"] < longer["step"] < LAST and longer["stopped_early"]["validations"] == 4
    summary = runs(copy, train__patience=0)
    assert {**summary, "seconds": 0} == {**endless[1], "seconds": 0}
    assert rows_of(copy) == rows_of(endless[0])
    assert tree_sha256(state_of(copy)) == tree_sha256(state_of(endless[0]))
    for before in (stopped[1], longer):
        assert json.loads((copy / f"summary_{before['step']}.json").read_text()) == before


def test_a_fork_has_the_patience_from_its_own_begin_on(runs, stopped, tmp_path):
    directory, begin = stopped[0], stopped[1]["step"]
    summary = runs(tmp_path / "new", directory)
    assert summary["forked_from"]["step"] == begin < summary["step"]
    validated = [row["step"] for row in rows_of(tmp_path / "new") if "val_loss" in row and row["step"] > begin]
    assert len(validated) >= 3 and summary["stopped_early"]["validations"] == 2  # the first one is the lowest so far
    assert rows_of(tmp_path / "new")[: len(rows_of(directory))] == rows_of(directory)


# --- the rule alone


def stop(directory, losses, step, patience=2, begin=0):
    rows = [{"step": at, "loss": 1.0} | ({} if loss is None else {"val_loss": loss}) for at, loss in losses.items()]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / fork.NAME).write_text(json.dumps({"step": begin}))
    return early_stopping.at(toy.config(**KEYS | {"train__patience": patience}), directory, step)


@pytest.mark.parametrize(
    ("losses", "step", "keys", "validations"),
    [
        ({2: 3.0, 4: 2.0, 6: 2.5, 8: 2.1}, 8, {}, 2),
        ({2: 3.0, 4: 2.0, 6: 2.0, 8: 2.0}, 8, {}, 2),  # an equal one is not lower
        ({2: 3.0, 4: 2.0, 6: 2.5, 8: 1.9}, 8, {}, 0),
        ({2: 3.0, 4: 2.0, 6: 2.5}, 6, {}, 0),
        ({2: 3.0, 4: 2.0, 6: 2.5, 8: 2.1, 10: 1.0}, 8, {}, 2),  # what comes later does not count
        ({2: 3.0, 4: 2.0, 5: None, 6: 2.5, 7: None, 8: 2.1}, 8, {}, 2),
        ({2: 3.0, 4: 2.0, 6: 2.5, 8: 2.1, 9: None}, 9, {}, 0),  # a row without a validation decides nothing
        ({2: 3.0, 4: 2.0, 6: 2.5, 8: 2.1}, 8, {"patience": 3}, 0),
        ({2: 3.0, 4: 2.0, 6: 2.5, 8: 2.1}, 8, {"patience": 1}, 2),
        ({2: 3.0, 4: 2.0, 6: 2.5, 8: 2.1}, 8, {"patience": 0}, 0),
        ({2: 3.0, 4: 2.0, 6: 2.5, 8: 2.1}, 8, {"begin": 4}, 0),
        ({26: 1.0, 28: 2.0, LAST: 2.0}, LAST, {}, 0),  # the end comes anyway
    ],
)
def test_when_training_stops(losses, step, keys, validations, tmp_path):
    found = stop(tmp_path, losses, step, **keys)
    assert (found.validations if found else 0) == validations
    if found:
        assert (found.lowest_val_loss, found.lowest_at_step) == (2.0, 4)


def test_every_process_does_what_process_0_reads(tmp_path, monkeypatch):
    config = toy.config(**KEYS)
    monkeypatch.setattr(processes, "on_first", lambda action: None)  # as on another process
    for said in (True, False):
        monkeypatch.setattr(processes, "bool_from_first", lambda value, said=said: said)
        assert early_stopping.rule(config, tmp_path)(4) is said


def test_without_validation_images_it_is_refused_before_anything_is_written(runs, tmp_path, monkeypatch):
    words = "train.patience=2 follows val_loss, and data.validation=0 sets no training images aside"
    with pytest.raises(ValueError, match=words):
        rules.check(toy.config(**KEYS | {"data__validation": 0}))
    monkeypatch.setattr(validation, "set_aside", lambda source, wanted: np.zeros(len(source), bool))
    with pytest.raises(ValueError, match=r"data.validation=8 sets none of the images of data.name='digits' aside"):
        runs(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_finishes_a_run_that_stopped_early(tmp_path):
    workdir.claim(toy.config(**KEYS), tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({"step": 8, "stopped_early": {"validations": 2}}))
    for keys, is_finished in (({}, True), ({"train__patience": 3}, False), ({"train__patience": 0}, False)):
        assert workdir.is_finished(tmp_path, toy.config(**KEYS | keys)) == is_finished
    assert workdir.is_finished(tmp_path)
    workdir.claim(toy.config(**KEYS | {"train__patience": 3}), tmp_path)
    assert (tmp_path / "summary_8.json").exists() and not workdir.is_finished(tmp_path)
