"""Studies of sampling: every variant is drawn once and scored separately, in sets whose spread is the error."""

import csv
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from configs import digits_conditional
from diffusion import data
from diffusion.evaluation import features, quality
from diffusion.evaluation.features import Batch, Features
from diffusion.evaluation.sampling import Sampler
from diffusion.experiment import build, workdir
from diffusion.programs import sample
from experiments import drawn, guidance, intervals, steps

pytestmark = pytest.mark.usefixtures("programs_compiled_once")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_guidance_is_that_of_labels_whatever_the_run_samples_with(tmp_path, monkeypatch):
    asked = {}

    def images(changes):
        asked.update(changes)
        raise InterruptedError

    monkeypatch.setattr(features, "classifier", lambda train_set: None)
    trained = SimpleNamespace(config=digits_conditional.get_config())
    with pytest.raises(InterruptedError):
        guidance.run(SimpleNamespace(trained=trained, directory=tmp_path, images=images), [0.0])
    assert asked["sample.guide"] == "" and asked["sample.guidance_interval"] == ()


def study_of(config):
    trained = SimpleNamespace(config=config, state=SimpleNamespace(step=7))
    return SimpleNamespace(trained=trained, num_sets=2, num_images=10, features="pixels")


def test_guidance_tells_the_sampler():
    other = {"sample.method": "heun", "sample.num_steps": 9, "sample.grid": "log_snr", "sample.labels": (3,)}
    config = drawn.changed(digits_conditional.get_config(), other)
    row = dict.fromkeys(drawn.METRICS, [1.0, 2.0])
    text = guidance.markdown([row | {"w": 0.0}], row, study_of(config))
    told = "method heun, num_steps 9, variance learned_range, seed 0, grid log_snr, labels all in turn"
    assert f" Sampler: {told}, guidance_interval every t. " in text


def test_steps_are_those_of_the_bound_whatever_the_run_samples_with():
    config, way = digits_conditional.get_config(), steps.Way("ancestral", "optimal", 10)
    guided = {"sample.guidance": 2.0, "sample.guide": "runs/worse", "sample.guidance_interval": (2.0, 4.0)}
    other = drawn.changed(config, guided | {"sample.grid": "karras"})
    asked = {"sample.method": "ancestral", "sample.variance": "optimal", "sample.num_steps": 10}
    plain, found = (drawn.changed(of, keys) for of, keys in ((config, asked), (other, way.changes)))
    # Samples that a run with the default keys already has are found again.
    assert sample.described(found, "optimal") == sample.described(plain, "optimal")
    row = dict.fromkeys(drawn.METRICS, [1.0, 2.0])
    text = steps.markdown([row | way._asdict()], row, study_of(other), "digits", 20)
    assert " Sampler: seed 0, labels all in turn, guidance 0.0, guidance_interval every t, grid even. " in text


@pytest.mark.parametrize(
    ("own", "others"),
    [("fixed_small", ["fixed_large", "optimal"]), ("learned_range", ["fixed_small", "fixed_large", "optimal"])],
)
def test_the_run_s_own_variance_is_drawn_once(own, others):
    ways = steps.ways_of(own, [5, 10])
    assert [way.variance for way in ways if way.num_steps == 5 and way.variance] == [*others, "model"]
    assert len(ways) == 2 * (len(others) + 1 + len(steps.WITHOUT_VARIANCE))


@pytest.mark.slow
def test_guidance_scores_every_weight_and_a_second_call_draws_nothing(labelled_run, tmp_path, monkeypatch):
    run = shutil.copytree(labelled_run, tmp_path / "run")

    def all_threes(images):  # right for one of ten labels in turn
        return Batch(np.zeros((len(images), 1)), np.eye(10)[np.full(len(images), 3)])

    monkeypatch.setattr(features, "classifier", lambda train_set: Features(all_threes))
    study = drawn.study("guidance", run, "pixels", num_images=10, num_sets=2)
    guidance.run(study, [0.0])
    rows = rows_of(run / "guidance.csv")
    assert [float(row["w"]) for row in rows] == [-1, 0]
    assert [row["accuracy"] for row in rows] == ["", "0.1"]
    assert (run / "guidance.png").exists() and (run / "guidance_samples.png").exists()

    # The distance of the first row, from its samples alone.
    folder = next((run / "guidance" / sample.SAMPLES).glob("*guidance-1-*"))
    images, train_set = sample.read(folder, 20), build.load_data(workdir.read_config(run), "train")
    flat = [part.reshape(len(part), -1) / 8 - 1.0 for part in (images[:10], images[10:], train_set.images())]
    moments = [(part.mean(axis=0), np.cov(part, rowvar=False)) for part in flat]
    distances = [quality.frechet_distance(*moments[i], *moments[2]) for i in (0, 1)]
    assert float(rows[0]["frechet_distance"]) == pytest.approx(np.mean(distances), rel=1e-6)
    half_width = 12.7062 * abs(distances[0] - distances[1]) / 2  # Student's quantile of two values
    assert float(rows[0]["frechet_distance_half_width"]) == pytest.approx(half_width, rel=1e-4)
    by_set = [[float(number) for number in row["frechet_distance_by_set"].split()] for row in rows]
    np.testing.assert_allclose(by_set[0], distances, rtol=1e-6)
    differences = np.subtract(by_set[0], by_set[1])  # set k less set k
    less = intervals.text(intervals.of_mean(differences), 3, signed=True)
    lines = (run / "guidance.md").read_text().splitlines()
    assert any(line.startswith("| -1 | ") and line.split(" | ")[2] == less for line in lines)
    assert any(line.startswith("| 0 | ") and line.split(" | ")[2] == "–" for line in lines)
    assert "mean ± 95% interval (Student's t, n = 2 sets)" in (run / "guidance.md").read_text()

    monkeypatch.setattr(Sampler, "batches", None)
    guidance.run(study, [0.0])
    assert rows_of(run / "guidance.csv") == rows


def test_guidance_needs_a_run_that_knows_images_without_labels(straight):
    with pytest.raises(ValueError, match="train with model.label_dropout > 0"):
        guidance.run(drawn.study("guidance", straight, "pixels", 10, 2), [0.0])


def test_guidance_needs_the_classifier_of_the_data(labelled_run):
    with pytest.raises(FileNotFoundError, match="trains with --mode=classifier"):
        guidance.run(drawn.study("guidance", labelled_run, "pixels", 10, 2), [0.0])


@pytest.mark.parametrize("num_images", [1, 300])
def test_a_study_of_no_samples_or_of_more_than_there_are_test_images_is_refused(straight, num_images):
    with pytest.raises(ValueError, match=f"--num_images={num_images} must be in 2…299, the number of test images"):
        drawn.study("steps", straight, "pixels", num_images, 2)


def test_a_study_without_sets_is_refused(straight):
    with pytest.raises(ValueError, match="--num_sets=0 must be at least 1"):
        drawn.study("steps", straight, "pixels", 10, 0)


def test_test_images_are_scored_in_sets_as_large_as_the_samples(straight):
    """A Fréchet distance is biased by about c/n, so only at equal n does it say which images are closer."""
    study, test_set = drawn.study("steps", straight, "pixels", 99, 2), data.load("digits", "test", "")
    found = drawn.real_images(study, test_set)
    images, order = test_set.images(), np.random.default_rng(0).permutation(299)
    by_set = [
        study.scorer.numbers([images[np.sort(order[99 * i : 99 * (i + 1)])]], 99)["frechet_distance"] for i in range(3)
    ]
    assert found["frechet_distance"] == pytest.approx(by_set, rel=1e-6)
    whole = drawn.study("steps", straight, "pixels", None, 2)
    assert whole.num_images == 299
    of_all = study.scorer.numbers([images], 299)["frechet_distance"]
    assert drawn.real_images(whole, test_set)["frechet_distance"] == pytest.approx([of_all]) and of_all < min(by_set)


@pytest.mark.slow
def test_all_steps_with_the_run_s_own_variance_have_the_run_s_own_bound(straight, tmp_path, monkeypatch):
    run = shutil.copytree(straight, tmp_path / "run")
    monkeypatch.setattr(steps, "VARIANCES", ("model", "optimal"))
    monkeypatch.setattr(steps, "WITHOUT_VARIANCE", ("ddim",))
    study = drawn.study("steps", run, "pixels", num_images=5, num_sets=1)
    steps.run(study, [6], num_scored=20)
    rows = {(row["method"], row["variance"]): row for row in rows_of(run / "steps.csv")}
    assert list(rows) == [("ancestral", "model"), ("ancestral", "optimal"), ("ddim", "")]
    summary = json.loads((run / "summary.json").read_text())
    assert float(rows["ancestral", "model"]["bpd"]) == pytest.approx(summary["test_bpd"], rel=1e-6)
    assert rows["ddim", ""]["bpd"] == ""
    own, optimal, ddim = (float(row["frechet_distance"]) for row in rows.values())
    lines = [line.strip("| ").split(" | ") for line in (run / "steps.md").read_text().splitlines()[4:]]
    less = [cells[3] for cells in lines if len(cells) == 7][1:]
    assert less == ["–", f"{optimal - own:+.3f}", f"{ddim - own:+.3f}", "–"]
    folders = {path.name.partition("-")[2].rpartition("-")[0] for path in (run / "steps" / sample.SAMPLES).iterdir()}
    assert folders == {"ancestral-6steps-learned_range", "ancestral-6steps-optimal", "ddim-6steps-learned_range"}


def test_too_many_steps_are_refused_before_anything_is_drawn(straight, tmp_path):
    run = shutil.copytree(straight, tmp_path / "run")
    study = drawn.study("steps", run, "pixels", num_images=5, num_sets=1)
    with pytest.raises(ValueError, match="cannot keep 7 of 6 steps"):
        steps.run(study, [7], num_scored=20)
    assert not (run / "steps").exists()
