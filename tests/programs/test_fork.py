"""--fork: a new run continues from another run's checkpoint, and takes the steps that the old one would have taken."""

import json
import shutil

import jax
import numpy as np
import pytest
import toy

from diffusion import data
from diffusion.experiment import build, workdir
from diffusion.programs import evaluate, fork, sample, train
from diffusion.reporting.metrics_log import read_metrics
from diffusion.runtime.checkpoint import Checkpoints
from diffusion.runtime.digests import tree_sha256


@pytest.fixture(autouse=True)
def toy_data(monkeypatch, programs_compiled_once):
    monkeypatch.setattr(data, "load", toy.load)
    monkeypatch.setattr(data, "describe", toy.describe)


@pytest.fixture
def unscored(monkeypatch):
    """What comes after training is left out."""
    monkeypatch.setattr(sample, "save", lambda *args: None)
    monkeypatch.setattr(evaluate, "score_run", lambda *args: {"protocol": {}, "test_bpd": 1.0})


def run(directory, forked="", **keys):
    small = {"train__num_steps": 12, "train__checkpoint_every": 4, "train__log_every": 2, "optim__decay": "constant"}
    train.run(toy.config(**small | keys), directory, forked=str(forked))
    return json.loads((directory / "summary.json").read_text())


def state_of(directory, step, **keys):
    experiment = toy.experiment(**keys)
    with Checkpoints(directory / "checkpoints") as checkpoints:
        return checkpoints.restore(step, experiment.abstract_state())


def rows_of(directory):
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in read_metrics(directory)]


@pytest.fixture
def source(tmp_path, unscored):
    run(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize(("ending", "step"), [("@8", 8), ("@4", 4)])
def test_with_the_same_keys_it_takes_the_same_steps_bit_by_bit(ending, step, source, tmp_path):
    summary = run(tmp_path / "new", f"{source}{ending}")
    assert tree_sha256(state_of(tmp_path / "new", 12)) == tree_sha256(state_of(source, 12))
    assert rows_of(tmp_path / "new") == rows_of(source)
    assert summary["forked_from"] == {
        "directory": str(source.resolve()), "step": step, "ema_sha256": tree_sha256(state_of(source, step).ema_params)
    }  # fmt: skip
    assert summary["params_sha256"] == json.loads((source / "summary.json").read_text())["params_sha256"]


def test_other_keys_change_what_comes_after_the_fork_alone(source, tmp_path):
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    run(tmp_path / "new", f"{source}@8", optim__learning_rate=0.5, train__num_steps=14)
    assert [row["step"] for row in rows_of(tmp_path / "new")] == [2, 4, 6, 8, 10, 12, 14]
    assert rows_of(tmp_path / "new")[:4] == rows_of(source)[:4] != rows_of(tmp_path / "new")[2:6]
    assert tree_sha256(state_of(tmp_path / "new", 8)) == tree_sha256(state_of(source, 8))
    old, new = state_of(source, 12), state_of(tmp_path / "new", 12)
    assert tree_sha256(old.params) != tree_sha256(new.params)
    assert before == {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    assert workdir.read_config(tmp_path / "new").optim.learning_rate == 0.5


@pytest.fixture
def saved(tmp_path):
    """A run whose only checkpoint, of step 8, holds numbers from a generator."""
    experiment, rng = toy.experiment(), np.random.default_rng(0)
    workdir.claim(experiment.config, tmp_path / "saved")
    like = experiment.abstract_state()
    state = jax.tree.map(lambda leaf: np.asarray(rng.uniform(1, 9, leaf.shape), leaf.dtype), like)
    with Checkpoints(tmp_path / "saved" / "checkpoints") as checkpoints:
        checkpoints.save(8, state.replace(step=np.int32(8)), {})
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("keys", "begins_anew"),
    [
        ({}, False),
        ({"objective__name": "hybrid"}, True),
        ({"train__skip_nonfinite": 3}, True),
        ({"objective__timesteps": "loss_aware(history_length=2)"}, True),
    ],
)
def test_what_another_objective_logs_and_its_draw_of_t_remembers_begins_anew(keys, begins_anew, saved, tmp_path):
    experiment, old = toy.experiment(**keys), state_of(saved, 8)
    state, like = fork.read(experiment, str(saved), tmp_path / "new").state, experiment.abstract_state()
    assert jax.tree.structure(state) == jax.tree.structure(like)
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [leaf.shape for leaf in jax.tree.leaves(like)]
    assert (state.window != old.window) == begins_anew
    assert not begins_anew or not any(np.any(leaf) for leaf in jax.tree.leaves((state.window, state.timesteps)))
    for part in ("step", "params", "ema_params", "opt_state"):
        assert tree_sha256(getattr(state, part)) == tree_sha256(getattr(old, part)), part


def test_a_fork_that_another_process_has_made_meanwhile_is_left_alone(saved, tmp_path):
    made, new = fork.read(toy.experiment(), str(saved), tmp_path / "new"), tmp_path / "new"
    new.mkdir()
    fork.write(made, new, {})
    (new / "metrics.jsonl").write_text('{"step": 9}\n')
    fork.write(made, new, {})
    assert rows_of(new) == [{"step": 9}]


def test_the_same_command_again_resumes_the_fork(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        toy.interrupt(patched, (10,), lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        run(tmp_path / "new", f"{source}@4")
    run(tmp_path / "new", f"{source}@4")
    assert tree_sha256(state_of(tmp_path / "new", 12)) == tree_sha256(state_of(source, 12))
    shutil.rmtree(source)
    run(tmp_path / "new", f"{source}@4")  # finished: it says so
    with pytest.raises(ValueError, match=r"new holds a run that comes from .*source@4; take another --workdir"):
        fork.read(toy.experiment(), f"{source}@8", tmp_path / "new")
    with pytest.raises(ValueError, match=r"new holds a run that comes from .*source@4; take another --workdir"):
        fork.read(toy.experiment(), str(tmp_path / "other"), tmp_path / "new")


def test_a_fork_that_was_killed_before_its_checkpoint_is_made_again(source, tmp_path):
    made = fork.read(toy.experiment(), str(source), tmp_path / "new")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / fork.NAME).write_text(json.dumps(made.origin))
    again = fork.read(toy.experiment(), str(source), tmp_path / "new")
    assert tree_sha256(again.state) == tree_sha256(state_of(source, 12)) and again.origin["step"] == 12


@pytest.mark.parametrize(
    ("ending", "keys", "words"),
    [
        ("@bets", {}, "the part after @ must be latest, best or the step"),
        ("@5", {}, "no checkpoint of step 5"),
        ("/none", {}, "holds no run"),
        ("", {"schedule__name": "learned(start='cosine')"}, "is not in the checkpoint|has no place in"),
        ("", {"model__variance": "fixed_small", "objective__name": "simple"}, "the config wants.*init_adapt=True"),
        ("", {}, "is at step 12, so train.num_steps=12 leaves nothing to train"),
        ("@8", {"train__num_steps": 6}, "is at step 8, so train.num_steps=6 leaves nothing to train"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(ending, keys, words, source, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        run(tmp_path / "new", f"{source}{ending}", **keys)
    assert not (tmp_path / "new").exists()


def test_averages_go_on_with_the_lengths_that_they_have(tmp_path, unscored):
    run(tmp_path / "source", ema__post_hoc=(0.05, 0.1), train__num_steps=4)
    words = r"lengths ema.post_hoc=\(0.05, 0.1\), which go on in a fork; the config has \(0.1, 0.2\)"
    with pytest.raises(ValueError, match=words):
        run(tmp_path / "new", tmp_path / "source", ema__post_hoc=(0.1, 0.2))
    assert not (tmp_path / "new").exists()


def test_a_fork_without_its_first_checkpoint_is_not_begun_anew_without_the_flag(source, tmp_path):
    made = fork.read(toy.experiment(), f"{source}@8", tmp_path / "new")
    run(tmp_path / "new", f"{source}@8", train__num_steps=12)
    shutil.rmtree(tmp_path / "new" / "checkpoints")
    (tmp_path / "new" / "summary.json").unlink()
    again = rf"stopped before its first checkpoint; give --fork=.*source@{made.origin['step']} again"
    with pytest.raises(ValueError, match=again):
        run(tmp_path / "new")


def test_a_fork_whose_checkpoints_are_damaged_is_not_begun_anew_over_its_metrics(source, tmp_path):
    run(tmp_path / "new", f"{source}@8")
    for folder in (tmp_path / "new" / "checkpoints").iterdir():
        shutil.rmtree(folder / "state")
    assert fork.read(toy.experiment(), f"{source}@8", tmp_path / "new") is None


def test_another_run_is_told_before_the_keys_that_differ_from_its_own(source, tmp_path):
    with pytest.raises(ValueError, match="source holds a run that is no fork; take another --workdir"):
        run(source, f"{tmp_path / 'old'}@8", optim__learning_rate=0.5)


def test_a_finished_run_is_not_said_to_be_a_fork(source):
    with pytest.raises(ValueError, match="source holds a run that is no fork; take another --workdir"):
        run(source, f"{source}@8")


def test_a_fork_does_not_need_what_the_old_run_started_from(source, tmp_path):
    run(tmp_path / "second", init_from=str(source))
    shutil.rmtree(source)
    assert run(tmp_path / "third", f"{tmp_path / 'second'}@8", init_from=str(source))["forked_from"]["step"] == 8


def test_validation_images_that_were_trained_on_are_told(source, tmp_path, caplog):
    run(tmp_path / "new", f"{source}@8", data__validation=5)
    assert "has seen validation images of data.validation=5" in caplog.text


def test_a_run_is_not_overwritten_by_a_fork(source, tmp_path):
    run(tmp_path / "mine")
    config = build.experiment(workdir.read_config(tmp_path / "mine"), toy.SHAPE, toy.LEVELS)
    before = {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="mine holds a run that is no fork; take another --workdir"):
        fork.read(config, str(source), tmp_path / "mine")
    assert before == {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()}
