"""--mode=quality: samples, and the test split, against the training split."""

import json
import shutil

import numpy as np
import pytest

from diffusion import data
from diffusion.evaluation import quality
from diffusion.evaluation.quality import Metric
from diffusion.programs import quality as program
from diffusion.programs import sample


@pytest.fixture(scope="module")
def sources(tiny_data_dir):
    return tuple(data.load("digits", split, tiny_data_dir) for split in ("train", "test"))


def test_a_run_is_compared_with_the_training_split(straight, tiny, sources, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / "run")
    config = tiny(quality__num_images=30, sample__method="ddim(eta=0.5)", sample__num_steps=3)
    program.run(config, tmp_path / "run")
    scores = json.loads((tmp_path / "run" / "quality.json").read_text())
    assert json.loads(capsys.readouterr().out) == scores

    experiment, state, model = sample.trained(config, tmp_path / "run")
    images = sample.Sampler(experiment).images(model, 30)
    assert len(images) == 30
    found = program.score(config, images, *sources)
    assert {key: scores[key] for key in found} == found
    assert 0 < scores["frechet_distance_test_split"] < scores["frechet_distance"]
    assert scores["num_samples"] == 30 and scores["features"] == "pixels"
    assert scores["reference"] == "digits, train split, 1498 images"
    assert scores["sampler"]["method"] == "ddim(eta=0.5)" and scores["sampler"]["num_steps"] == 3
    assert scores["step"] == state.step == 6 and scores["device"] == "cpu ×8" and "jax" in scores["versions"]
    assert scores["ema_sha256"] == json.loads((straight / "summary.json").read_text())["ema_sha256"]
    assert "biased upwards" in scores["note"]


def test_samples_are_measured_if_they_are_of_the_last_weights_and_as_asked_for(straight, tiny, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    asked = {"quality__num_images": 9, "sample__num_steps": 3}
    assert not program.is_measured(tiny(**asked), tmp_path / "run")
    program.run(tiny(**asked), tmp_path / "run")
    assert program.is_measured(tiny(**asked), tmp_path / "run")
    assert program.is_measured(tiny(**asked, sample__batch_size=5), tmp_path / "run")
    for other in (
        {"quality__num_images": 8}, {"quality__features": "classifier"}, {"quality__reference": "test"},
        {"quality__reference": "train.npz"}, {"sample__num_steps": 2}, {"sample__method": "ddim"},
        {"sample__variance": "fixed_small"},
    ):  # fmt: skip
        assert not program.is_measured(tiny(**(asked | other)), tmp_path / "run"), other
    path = tmp_path / "run" / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps(summary | {"ema_sha256": "of a longer run"}))
    assert not program.is_measured(tiny(**asked), tmp_path / "run") and program.read(tmp_path / "run") == {}


def test_the_training_split_is_at_distance_0_from_itself(tiny, sources):
    train, test = sources
    scores = program.score(tiny(), train.images(), train, test)
    assert 0 <= scores["frechet_distance"] < 1e-9
    swapped = program.score(tiny(), test.images(), train, test)
    np.testing.assert_allclose(swapped["frechet_distance"], scores["frechet_distance_test_split"], rtol=1e-12)


def test_the_note_on_bias_is_for_fewer_than_50_000_samples(tiny, sources, monkeypatch):
    train, test = sources
    images = train.images(slice(10))
    assert "that of 10 samples" in program.score(tiny(), images, train, test)["note"]
    monkeypatch.setattr(program, "USUAL_IMAGES", 10)
    assert "note" not in program.score(tiny(), images, train, test)


def test_a_metric_is_one_entry_of_the_table(tiny, sources, monkeypatch):
    """The largest feature: init, update and result, and its name appears in quality.json."""
    train, test = sources

    def largest(state, features):
        return np.maximum(state, features.max(axis=0))

    def gap(generated, reference):
        return {"gap": float(np.max(reference - generated))}

    monkeypatch.setitem(quality.METRICS, "gap", Metric(lambda dimension: np.full(dimension, -1.0), largest, gap))
    scores = program.score(tiny(), np.zeros((2, 8, 8, 1), np.uint8), train, test)
    assert scores["gap"] == 2.0 and scores["gap_test_split"] < 2.0
    assert scores.keys() >= {"frechet_distance", "frechet_distance_test_split"}


def test_a_feature_that_does_not_exist_is_named(tiny, straight):
    with pytest.raises(ValueError, match="quality.features must be one of pixels, not 'pixel'; did you mean pixels?"):
        program.run(tiny(quality__features="pixel"), straight)
