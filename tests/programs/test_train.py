"""Training end to end, on the bundled digits with a tiny network: what a run leaves, resuming, and refusals."""

import json
import shutil

import jax
import numpy as np
import pytest

from diffusion import data
from diffusion.experiment import build
from diffusion.programs import evaluate, sample, train
from diffusion.reporting import metrics_log
from diffusion.runtime.checkpoint import Checkpoints
from diffusion.runtime.preemption import Preemption
from diffusion.training import loop


def rows_without_time(directory):
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in metrics_log.read_metrics(directory)]


def test_a_run_leaves_everything_it_promises(straight):
    files = {path.name for path in straight.iterdir()}
    assert files >= {"config.json", "metrics.jsonl", "checkpoints", "tensorboard", "samples.png", "samples.npz",
                     "progressive.png", "loss.png", "bpd.png", "bpd.npz", "rate_distortion.png", "summary.json",
                     "samples_4.png"}  # fmt: skip
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["step"] == 6 and summary["test_images"] == 20 and summary["device"] == "cpu ×8"
    parts = summary["test_decoder_bpd"] + summary["test_kl_bpd"] + summary["prior_bpd"]
    np.testing.assert_allclose(summary["test_bpd"], parts, rtol=1e-6)
    assert summary["test_bpd_stderr"] > 0 and summary["seconds"] > 0 and summary["versions"]["jax"] == jax.__version__
    with np.load(straight / "bpd.npz") as saved:
        np.testing.assert_allclose(saved["test_image_bpd"].mean(), summary["test_bpd"], rtol=1e-6)
        np.testing.assert_allclose(saved["test_terms_bpd"].sum() + summary["prior_bpd"], summary["test_bpd"], rtol=1e-6)
        np.testing.assert_allclose(saved["test_rate_bpd"][0], summary["test_rate_bpd"], rtol=1e-6)
        np.testing.assert_allclose(saved["test_rate_bpd"][-1], summary["prior_bpd"], rtol=1e-6)
        np.testing.assert_allclose(saved["test_distortion_rmse"][0], summary["test_distortion_rmse"], rtol=1e-6)
        assert json.loads(str(saved["protocol"])) == summary["protocol"]
    assert summary["protocol"] == {
        "name": "exact", "decoder_cdf": "exact", "x0_clipped": True, "parameters": "EMA, decay 0.99",
        "variance": "learned_range", "schedule": "cosine", "num_steps": 6,
        "estimator": "every term", "draws_per_term": 1, "seed": 0,
        "test_images": "20 of 299", "train_images": "20 of 1498",
    }  # fmt: skip
    images = np.load(straight / "samples.npz")["images"]
    assert images.shape == (9, 8, 8, 1) and images.dtype == np.uint8 and images.max() <= 16
    rows = metrics_log.read_metrics(straight)
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    assert all("test_loss" in row for row in rows if row["step"] in (3, 6))


def test_a_stopped_run_resumes_bit_identically(straight, tiny, tmp_path, monkeypatch):
    batch_indices, killed_at = data.batch_indices, 5

    def killed(seed, step, *sizes):
        if step == killed_at:
            raise KeyboardInterrupt
        return batch_indices(seed, step, *sizes)

    monkeypatch.setattr(loop, "batch_indices", killed)
    with pytest.raises(KeyboardInterrupt):
        train.run(tiny(), tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()
    assert [row["step"] for row in metrics_log.read_metrics(tmp_path / "run")] == [2, 3, 4]
    killed_at = -1
    train.run(tiny(), tmp_path / "run")
    one, two = (json.loads((run / "summary.json").read_text()) for run in (straight, tmp_path / "run"))
    for key in one.keys() - {"seconds"}:
        assert one[key] == two[key], key
    assert rows_without_time(straight) == rows_without_time(tmp_path / "run")
    np.testing.assert_array_equal(*(np.load(run / "samples.npz")["images"] for run in (straight, tmp_path / "run")))


def test_a_finished_run_says_so_and_does_nothing(straight, tiny, capsys):
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    train.run(tiny(sample__num_images=3), straight)
    assert "finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in straight.rglob("*")}


def test_a_run_that_was_trained_but_not_scored_is_scored(straight, tiny, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    train.run(tiny(), tmp_path / "run")
    one, two = (json.loads((run / "summary.json").read_text()) for run in (straight, tmp_path / "run"))
    assert {key: one[key] for key in one if key != "seconds"} == {key: two[key] for key in two if key != "seconds"}
    assert metrics_log.read_metrics(straight) == metrics_log.read_metrics(tmp_path / "run")


def test_another_config_is_refused_and_nothing_changes(straight, tiny, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    for mode in (train, evaluate, sample):
        with pytest.raises(ValueError, match=r"another config \(optim.learning_rate: 0.00\d+ → 0.5; seed: 0 → 7\)"):
            mode.run(tiny(seed=7, optim__learning_rate=0.5), tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_text() == (straight / "config.json").read_text()


def test_a_batch_that_does_not_divide_is_refused_by_name(tiny, tmp_path):
    with pytest.raises(ValueError, match="train.batch_size=12 does not divide by 8 devices"):
        train.run(tiny(train__batch_size=12), tmp_path / "run")
    with pytest.raises(ValueError, match=r"train.batch_size=16 does not divide by 8 devices × train.grad_accum=4"):
        train.run(tiny(train__grad_accum=4), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_nan_stops_the_run_and_names_step_and_term(tiny, tmp_path):
    config = tiny()
    experiment = build.experiment(config, (8, 8, 1), 17)
    start = jax.device_get(experiment.initial_state())
    poisoned = start.replace(params=jax.tree.map(lambda leaf: leaf * np.nan, start.params))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(0, poisoned, {})
    sets = (data.load(config.data.name, split, config.data.data_dir) for split in ("train", "test"))
    with pytest.raises(FloatingPointError, match=r"step 1: .*loss = nan.*vlb_bpd = nan"):
        train.train(experiment, tmp_path, *sets, sample.sampler(experiment), Preemption())
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 0


def test_the_optimal_variance_needs_a_trained_mean(tiny, tmp_path):
    for changes in ({"eval__variance": "optimal"}, {"sample__variance": "optimal"}):
        with pytest.raises(ValueError, match="which needs a trained mean"):
            train.run(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
