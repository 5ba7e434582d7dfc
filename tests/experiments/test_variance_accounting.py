"""The accounting of variances on an untrained network: the cost of a variance needs no training."""

import csv
import json

import jax
import numpy as np
import pytest

from diffusion import data
from diffusion.evaluation.bound import full_bound
from diffusion.evaluation.images import subset
from diffusion.experiment import build, config, ema, workdir
from diffusion.programs import evaluate, sample
from diffusion.runtime import devices
from diffusion.runtime.checkpoint import Checkpoints
from experiments import variance_accounting
from experiments.commands import exit_with

NUM_IMAGES = 24


@pytest.fixture(scope="module")
def directory(tiny, tmp_path_factory):
    """A run with a checkpoint of its initial state, and the accounting of it."""
    directory, settings = tmp_path_factory.mktemp("runs") / "run", tiny()
    workdir.claim(settings, directory)
    experiment = build.experiment(settings, (8, 8, 1), 17)
    with Checkpoints(directory / "checkpoints") as checkpoints:
        checkpoints.save(0, jax.device_get(experiment.initial_state()), {"val_loss": 1.0})
    variance_accounting.run(directory, NUM_IMAGES)
    return directory


@pytest.fixture(scope="module")
def rows(directory):
    with (directory / "variance_accounting.csv").open() as file:
        read = list(csv.DictReader(file))
    assert {row.pop("ema_sha256") for row in read} == {workdir.load(directory).state.sha256}
    assert {(row["images"], row["train_images"]) for row in read} == {(str(NUM_IMAGES),) * 2}
    return {row.pop("variance"): {k: float(v) for k, v in row.items()} for row in read}


def test_the_table_repeats_the_evaluation_and_adds_up(directory, rows):
    """Same images, same noise, same parameters: the model's own variance has the bound that evaluation prints."""
    run = workdir.load(directory)
    test_set = data.load("digits", "test", run.config.data.data_dir)
    score = full_bound(build.bound_settings(run.config))
    bound = score(devices.replicate(run.model), test_set, subset(len(test_set), NUM_IMAGES))
    np.testing.assert_allclose(rows["learned_range"]["bpd"], bound.image_bpd.mean(), rtol=1e-5)
    for name, row in rows.items():
        parts = row["decoder"] + row["mismatch"] + row["mean_error"] + bound.prior_bpd.mean()
        np.testing.assert_allclose(row["bpd"], parts, rtol=1e-9, err_msg=name)
        np.testing.assert_allclose(row["difference"], row["bpd"] - rows["learned_range"]["bpd"], atol=1e-9)


def test_pairing_narrows_the_error_of_a_difference(rows):
    own = rows.pop("learned_range")
    for name, row in rows.items():
        assert 0 < row["difference_stderr"] < 0.5 * np.hypot(row["stderr"], own["stderr"]), name
    rows["learned_range"] = own


def test_what_the_mean_needs_beats_every_other_fixed_variance(rows):
    """Far from E[x_0 | x_t], only the variance that counts the mean's own error is the best one."""
    best = rows["optimal for this mean"]["bpd"]
    assert all(best <= row["bpd"] for name, row in rows.items() if name != "learned_range")
    assert rows["fixed_small"]["mismatch"] == 0 < rows["interpolated 0.5"]["mismatch"] < rows["fixed_large"]["mismatch"]


def test_the_report_is_written(directory):
    text = (directory / "variance_accounting.md").read_text()
    assert "24 test images" in text and "| fixed_small | " in text and "clipped" in text
    assert (directory / "variance_accounting.png").stat().st_size > 10_000
    assert ema.load_x0_variance(directory, workdir.load(directory).state).mean.shape == (7,)


@pytest.mark.parametrize("variance", ["fixed_large", "optimal"])
def test_a_checkpoint_is_scored_under_another_variance(directory, rows, variance):
    """Without retraining, whatever it was trained with: --mode=eval finds what the accounting found."""
    settings = workdir.read_config(directory)
    with settings.unlocked():
        settings.update_from_flattened_dict({"eval.num_images": NUM_IMAGES, "eval.variance": variance})
    evaluate.run(settings, directory)
    found = json.loads((directory / "eval.json").read_text())
    assert found["protocol"]["variance"] == variance
    np.testing.assert_allclose(found["test_bpd"], rows[variance]["bpd"], rtol=1e-5)


def test_a_checkpoint_is_sampled_with_the_optimal_variance(directory, tmp_path):
    settings = workdir.read_config(directory)
    drawn = {}
    for variance in ("model", "optimal"):
        changes = {"sample.num_images": 8, "sample.num_steps": 4, "sample.variance": variance}
        with settings.unlocked():
            settings.update_from_flattened_dict(changes)
        sample.run(settings, directory)
        drawn[variance] = np.load(directory / "samples.npz")["images"]
    assert np.any(drawn["model"] != drawn["optimal"])
    with pytest.raises(ValueError, match="the optimal variance needs a trained mean"):
        workdir.load(directory).experiment.model({}, variance="optimal")
    with pytest.raises(FileNotFoundError, match="x0_variance.npz; python -m experiments.variance_accounting"):
        ema.load_x0_variance(tmp_path, workdir.load(directory).state)


def test_a_mistake_prints_a_one_line_error(directory, tmp_path, monkeypatch, capsys):
    def fails(*arguments):
        monkeypatch.setattr("sys.argv", ["variance_accounting", *arguments])
        with pytest.raises(SystemExit, match="2"):
            exit_with(variance_accounting.main)
        return capsys.readouterr().err.splitlines()[-1]

    assert "holds no run (no config.json)" in fails(f"--workdir={tmp_path}")
    assert "--num_images=1 must be 0 or in 2…299" in fails(f"--workdir={directory}", "--num_images=1")


def test_a_config_survives_its_file(directory):
    config.check(workdir.read_config(directory))
    assert workdir.read_config(directory).unet.channel_mult == (1,)  # a tuple, which JSON has not
