"""Studies of sampling: every way is drawn once and scored by itself, in sets whose spread is the error."""

import csv
import json
import shutil

import numpy as np
import pytest

from diffusion import data
from diffusion.evaluation import quality
from diffusion.experiment import workdir
from diffusion.programs import sample
from experiments import drawn, guidance, steps


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_guidance_scores_every_weight_and_a_second_call_draws_nothing(labelled_run, tmp_path, monkeypatch):
    run = shutil.copytree(labelled_run, tmp_path / "run")
    # A classifier that takes every image for a 3: right for one of ten labels in turn.
    judge = type("Judge", (), {})()
    judge.facts = type("Facts", (), {"num_classes": 10, "test_accuracy": 0.1})()
    judge.outputs = lambda images: (None, np.eye(10)[np.full(len(images), 3)])
    monkeypatch.setattr(guidance, "_classifier", lambda *_: judge)
    guidance.run(run, [0.0, 60.0], "pixels", num_images=10, num_sets=2)
    rows = rows_of(run / "guidance.csv")
    assert [float(row["w"]) for row in rows] == [-1, 0, 60]
    assert [row["accuracy"] for row in rows] == ["", "0.1", "0.1"]
    assert (run / "guidance.png").exists() and (run / "guidance_samples.png").exists()

    # The distance of the first row, from its samples alone.
    folder = next((run / "guidance" / sample.SAMPLES).glob("*guidance-1"))
    images, train_set = sample.read(folder, 20), data.load("digits", "train", workdir.read_config(run).data.data_dir)
    flat = [part.reshape(len(part), -1) / 8 - 1.0 for part in (images[:10], images[10:], train_set.images())]
    moments = [(part.mean(axis=0), np.cov(part, rowvar=False)) for part in flat]
    distances = [quality.frechet_distance(*moments[i], *moments[2]) for i in (0, 1)]
    assert float(rows[0]["frechet_distance"]) == pytest.approx(np.mean(distances), rel=1e-6)
    assert float(rows[0]["frechet_distance_spread"]) == pytest.approx(np.std(distances, ddof=1), rel=1e-4)

    monkeypatch.setattr(sample.Sampler, "batches", None)
    guidance.run(run, [0.0, 60.0], "pixels", num_images=10, num_sets=2)
    assert rows_of(run / "guidance.csv") == rows


def test_guidance_needs_a_run_that_knows_images_without_labels(straight):
    with pytest.raises(ValueError, match="train with model.label_dropout > 0"):
        guidance.run(straight, [0.0], "pixels", 10, 2)


def test_all_steps_with_the_run_s_own_variance_have_the_run_s_own_bound(straight, tmp_path, monkeypatch):
    run = shutil.copytree(straight, tmp_path / "run")
    monkeypatch.setattr(steps, "VARIANCES", ("model", "optimal"))
    monkeypatch.setattr(steps, "WITHOUT_VARIANCE", ("ddim",))
    study = drawn.study(run, steps.FILE, "latest", "pixels", num_images=5, num_sets=1)
    steps.run(run, study, [3, 6], "pixels", num_scored=20)
    rows = {(row["method"], row["variance"], row["num_steps"]): row for row in rows_of(run / "steps.csv")}
    assert len(rows) == 6
    summary = json.loads((run / "summary.json").read_text())
    assert float(rows["ancestral", "model", "6"]["bpd"]) == pytest.approx(summary["test_bpd"], rel=1e-6)
    assert float(rows["ancestral", "model", "3"]["bpd"]) > summary["test_bpd"]
    assert rows["ddim", "", "3"]["bpd"] == ""
    folders = {path.name for path in (run / "steps" / sample.SAMPLES).iterdir()}
    assert "step6-ancestral-3steps-optimal" in folders and "step6-ddim-6steps-learned_range" in folders


def test_too_many_steps_are_refused_before_anything_is_drawn(straight, tmp_path):
    run = shutil.copytree(straight, tmp_path / "run")
    study = drawn.study(run, steps.FILE, "latest", "pixels", num_images=5, num_sets=1)
    with pytest.raises(ValueError, match="cannot keep 7 of 6 steps"):
        steps.run(run, study, [7], "pixels", 20)
    assert not (run / "steps").exists()
