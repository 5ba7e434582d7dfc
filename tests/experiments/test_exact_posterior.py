"""The comparison of a network with the exact posterior, on a network that was never trained."""

import json

import jax
import numpy as np
import pytest

from diffusion.evaluation.bound import full_bound
from diffusion.evaluation.images import subset
from diffusion.experiment import build, workdir
from diffusion.runtime import devices
from diffusion.runtime.checkpoint import Checkpoints
from experiments import exact_posterior
from experiments.commands import exit_with
from experiments.exact_posterior_plots import EXACT, NETWORK, SHOWN

NUM_IMAGES = 24


@pytest.fixture(scope="module")
def directory(tiny, tmp_path_factory):
    """A run with a checkpoint of its initial state, and what the command leaves in it."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    settings = tiny(schedule__num_steps=20, eval__batch_size=32)
    workdir.claim(settings, directory)
    experiment = build.experiment(settings, (8, 8, 1), 17)
    with Checkpoints(directory / "checkpoints") as checkpoints:
        checkpoints.save(0, jax.device_get(experiment.initial_state()), {"val_loss": 1.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact_posterior, "TIMED_RUNS", 1)
        exact_posterior.run(directory, NUM_IMAGES, SHOWN)
    return directory


@pytest.fixture(scope="module")
def results(directory):
    return json.loads((directory / "exact_posterior.json").read_text())


@pytest.mark.slow
def test_the_network_is_scored_as_the_evaluation_scores_it(directory, results):
    run = workdir.load(directory)
    bound, model = full_bound(build.bound_settings(run.config)), devices.replicate(run.model)
    for split in ("train", "test"):
        source = build.load_data(run.config, split)
        expected = bound(model, source, subset(len(source), NUM_IMAGES)).terms_bpd.sum(axis=1).mean()
        np.testing.assert_allclose(results["bpd"][split][NETWORK]["mean"], expected, rtol=1e-5)


@pytest.mark.slow
def test_the_exact_posterior_wins_on_training_images_and_pays_on_others(results):
    train, test = results["per_t"]["train"], results["per_t"]["test"]
    assert np.all(np.array(train[EXACT]["eps_mse"]["mean"]) <= train[NETWORK]["eps_mse"]["mean"])
    assert test[EXACT]["eps_mse"]["mean"][0] > 10 * test[NETWORK]["eps_mse"]["mean"][0]
    # Nothing codes a uniform choice among N images in less than log N.
    assert np.log2(1368) / 64 < train[EXACT]["bpd"]["mean"] < 1 < 10 < test[EXACT]["bpd"]["mean"]
    effective = np.array(train[EXACT]["effective_images"]["median"])
    np.testing.assert_allclose(effective[[0, -1]], [1, 1368], rtol=1e-2)
    assert np.all(np.diff(effective) > -1e-3)


@pytest.mark.slow
def test_its_samples_are_training_images(results):
    neighbours = results["nearest_training_image"]
    assert neighbours[EXACT]["identical"] == SHOWN and neighbours[EXACT]["different_neighbours"] > SHOWN // 2
    assert neighbours[NETWORK]["identical"] == neighbours["test images"]["identical"] == 0


def test_the_nearest_neighbour_is_exact():
    rng = np.random.default_rng(0)
    train_images, moved = rng.integers(0, 256, (9, 4, 4, 3), np.uint8), np.array([5, 2])
    index, rmse = exact_posterior.nearest(train_images[moved] ^ 1, train_images)  # every number off by one
    assert index.tolist() == [5, 2] and rmse.tolist() == [1.0, 1.0]


@pytest.mark.slow
def test_the_pictures_are_written(directory):
    for name in ("gap", "samples", "nearest", "cost"):
        assert (directory / f"exact_posterior_{name}.png").stat().st_size > 10_000


def test_a_network_with_labels_is_refused_before_anything_is_scored(labelled_run, tmp_path, monkeypatch):
    for name in ("score", "cost"):
        monkeypatch.setattr(exact_posterior, name, None)
    with pytest.raises(ValueError, match="has model.conditional=True, and the exact posterior takes no labels$"):
        exact_posterior.run(labelled_run, NUM_IMAGES, SHOWN)
    with pytest.raises(ValueError, match="^configs/digits_conditional.py has model.conditional=True"):
        exact_posterior.run_cost("configs/digits_conditional.py", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_mistake_prints_a_one_line_error(straight, monkeypatch, capsys):
    def fails(*arguments):
        monkeypatch.setattr("sys.argv", ["exact_posterior", f"--workdir={straight}", *arguments])
        with pytest.raises(SystemExit, match="2"):
            exit_with(exact_posterior.main)
        return capsys.readouterr().err.splitlines()[-1]

    assert "--num_images=1 must be in 2…299" in fails("--num_images=1")
    assert "--num_samples=3 must be at least 14" in fails("--num_samples=3")
