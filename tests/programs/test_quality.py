"""--mode=quality: samples against a reference, with real images for comparison."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import toy

from diffusion.data import Source
from diffusion.evaluation import classifier as classifiers
from diffusion.evaluation import features, quality
from diffusion.evaluation.features import Batch, Features
from diffusion.evaluation.quality import Metric
from diffusion.experiment import build, workdir
from diffusion.networks import NETWORKS
from diffusion.programs import classifier, sample
from diffusion.programs import quality as program
from diffusion.reporting.metrics_log import read_metrics

pytestmark = pytest.mark.usefixtures("programs_compiled_once")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, and few subsets, or most of the time would go into KID."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(quality, "KID_SUBSETS", 3)
    return tmp_path / "cache" / "diffusion"


@pytest.fixture(scope="module")
def sources(tiny):
    return build.load_splits(tiny())


@pytest.fixture
def small():
    """Splits of 40 and 30 images."""
    pixels = np.random.default_rng(0).integers(0, 17, (70, 3, 3, 1)).astype(np.uint8)
    return Source("small", "train", pixels[:40], 17), Source("small", "test", pixels[40:], 17)


@pytest.fixture
def run(straight, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(straight, tmp_path / "run")


def score(config, images, *sources):
    return program.Scorer(config, sources).scores([images], len(images))


def saved(directory):
    return json.loads((directory / "quality.json").read_text())


def test_a_split_of_one_image_has_no_covariance_and_counts_as_missing(tiny, small):
    train, test = small
    one, few = (Source("small", "test", test.images(slice(number)), 17) for number in (1, 2))
    compared = tiny(quality__reference="train", quality__features="pixels")
    images = test.images()
    assert "frechet_distance_test_split" in score(compared, images, train, few)
    assert "frechet_distance_test_split" not in score(compared, images, train, one)
    with pytest.raises(ValueError, match="^quality.reference='test' has fewer than two images here$"):
        program.Scorer(tiny(quality__reference="test", quality__features="pixels"), [train, one])
    with pytest.raises(ValueError, match="^quality takes a training split of 4 images or more"):
        program.Scorer(compared, [Source("small", "train", train.images(slice(3)), 17), test])


PROMISED = {
    *("kid", "kid_std", "inception_score", "inception_score_std", "precision", "recall", "num_samples", "features"),
    *("reference", "sampler", "weights_sha256", "frechet_distance", "frechet_infinity", "frechet_infinity_stderr"),
    *("frechet_equal_n", "frechet_equal_n_images", "frechet_equal_n_test_split", "step", "ema_sha256", "note"),
}


def test_a_run_is_compared_with_the_training_split(run, straight, tiny, sources, capsys):
    config = tiny(quality__num_images=30, sample__method="ddim(eta=0.5)", sample__num_steps=3)
    program.run(config, run)
    scores = saved(run)
    assert json.loads(capsys.readouterr().out) == scores and scores.keys() >= PROMISED

    loaded = workdir.load(run, config=config)
    images = sample.make_sampler(loaded.experiment).images(loaded.model, 30)
    found = score(config, images, *sources)
    assert {key: scores[key] for key in found} == found
    assert 0 < scores["frechet_distance_test_split"] < scores["frechet_distance"] and "fid" not in scores
    assert scores["num_samples"] == 30 and scores["features"] == "pixels" and scores["weights_sha256"] is None
    assert scores["reference"] == "digits, train split, 1368 images"
    assert scores["sampler"]["method"] == "ddim(eta=0.5)" and scores["sampler"]["num_steps"] == 3
    assert scores["step"] == loaded.state.step == 6 and scores["device"] == "cpu ×8" and "jax" in scores["versions"]
    assert scores["ema_sha256"] == json.loads((straight / "summary.json").read_text())["ema_sha256"]
    assert "biased upwards" in scores["note"] and scores["inception_score"] is None


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


def test_another_reference_or_other_data_of_the_same_name_are_not_what_was_measured(tiny, tmp_path):
    path, data_sha256 = tmp_path / "stats.npz", {"train": "aa", "test": "bb"}
    path.write_bytes(b"some statistics")
    config = tiny(quality__reference=str(path))
    sampler = sample.described(config, config.model.variance)
    asked = {"num_samples": config.quality.num_images, "features": config.quality.features, "sampler": sampler}
    reference = {"reference": f"{path}, SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}"}
    known = {"ema_sha256": "cc", "data_sha256": data_sha256}
    (tmp_path / "quality.json").write_text(json.dumps(asked | reference | known))

    def is_measured(**summary):
        (tmp_path / "summary.json").write_text(json.dumps({"ema_sha256": "cc"} | summary))
        return program.is_measured(config, tmp_path)

    assert is_measured(data_sha256=data_sha256)
    assert is_measured()  # a run of an earlier version
    assert not is_measured(data_sha256=data_sha256 | {"train": "dd"})
    path.write_bytes(b"other statistics")
    assert not is_measured(data_sha256=data_sha256)
    path.unlink()
    assert is_measured(data_sha256=data_sha256)


def test_samples_that_exist_are_taken_and_those_of_a_killed_call_too(run, tiny, sources, monkeypatch):
    monkeypatch.setattr(sample, "SHARD_IMAGES", 4)
    shutil.rmtree(run / sample.SAMPLES)
    config = tiny(quality__num_images=9)
    program.run(config, run)
    (folder,) = (run / sample.SAMPLES).iterdir()
    drawn = saved(run)
    sample.shard(folder, 1).unlink()  # as if it had been killed before this shard
    np.save(sample.shard(folder, 0), np.zeros((4, 8, 8, 1), np.uint8))
    program.run(config, run)
    again = np.concatenate([np.load(sample.shard(folder, number)) for number in range(3)])
    assert not again[:4].any() and again[4:].any()
    of_again = score(config, again, *sources)["frechet_distance"]
    assert saved(run)["frechet_distance"] == pytest.approx(of_again) != drawn["frechet_distance"]


def test_samples_and_real_images_are_compared_at_equal_numbers(tiny, small):
    """As many samples as test images: the mean over disjoint subsets of whichever side has more."""
    train_set, test_set = small
    drawn = np.random.default_rng(1).integers(0, 17, (95, 3, 3, 1)).astype(np.uint8)
    scores = score(tiny(), drawn, *small)
    order = np.random.default_rng(0).permutation(95)
    parts = [score(tiny(), drawn[np.sort(order[30 * i : 30 * (i + 1)])], *small)["frechet_distance"] for i in range(3)]
    assert scores["frechet_equal_n_images"] == 30
    assert scores["frechet_equal_n"] == pytest.approx(np.mean(parts), rel=1e-6) != scores["frechet_distance"]
    assert scores["frechet_equal_n_stderr"] == pytest.approx(np.std(parts, ddof=1) / 3**0.5, rel=1e-4)
    assert scores["frechet_equal_n_test_split"] == pytest.approx(scores["frechet_distance_test_split"])
    assert scores["frechet_equal_n_stderr_test_split"] is None
    few = score(tiny(), drawn[:14], *small)
    assert few["frechet_equal_n_images"] == 14 and few["frechet_equal_n"] == pytest.approx(few["frechet_distance"])
    assert few["frechet_equal_n_test_split"] > few["frechet_distance_test_split"]


@pytest.mark.parametrize("is_fid", [True, False])
def test_only_inceptions_features_give_an_fid(tiny, small, monkeypatch, is_fid):
    kind = features.pixels(small[0])._replace(is_fid=is_fid)
    monkeypatch.setitem(features.FEATURES, "pixels", lambda train_set: kind)
    scores = score(tiny(), small[1].images(), *small)
    named = {name for name in scores if name.startswith("fid")}
    of = ("fid", "fid_infinity", "fid_infinity_stderr")
    wanted = {f"{name}{end}" for name in of for end in ("", "_test_split", "_train_halves")}
    assert named == (wanted if is_fid else set())
    for name in named:
        own = name.replace("fid_infinity", "frechet_infinity") if "infinity" in name else f"frechet_distance{name[3:]}"
        assert scores[name] == scores[own], name


def test_the_scale_is_the_other_split_and_two_halves_of_the_training_set(tiny, small):
    train_set, test_set = small
    scores = score(tiny(), train_set.images(), *small)
    assert 0 <= scores["frechet_distance"] < 1e-9 and scores["precision"] == scores["recall"] == 1
    pixels = features.pixels(train_set)
    swapped = score(tiny(), test_set.images(), *small)
    for name in ("frechet_distance", "kid", "precision", "recall"):
        assert swapped[name] == scores[f"{name}_test_split"]
    is_second = np.random.default_rng(0).permutation(40) % 2 == 1
    halves = [quality.states(pixels.batches(train_set.images()[which])) for which in (~is_second, is_second)]
    for name, value in quality.results(*halves).items():
        assert scores[f"{name}_train_halves"] == (value if value is None else pytest.approx(value))


def test_the_reference_is_the_test_split_or_others_numbers(tiny, small, tmp_path):
    train_set, test_set = small
    of_test = score(tiny(quality__reference="test"), train_set.images(), *small)
    assert of_test["reference"] == "small, test split, 30 images" and "frechet_distance_test_split" not in of_test
    assert of_test["frechet_distance"] == of_test["frechet_distance_train_split"] > 0
    pixels = np.float64(test_set.images().reshape(30, -1)) / 8 - 1
    path = tmp_path / "stats.npz"
    np.savez(path, mu=pixels.mean(axis=0), sigma=np.cov(pixels, rowvar=False))
    of_file = score(tiny(quality__reference=str(path)), train_set.images(), *small)
    assert of_file["frechet_distance"] == pytest.approx(of_test["frechet_distance"])
    assert of_file["frechet_distance_test_split"] < 1e-9
    assert of_file["kid"] is None and of_file["recall"] is None and of_file["kid_train_halves"] is not None
    assert of_file["reference"].startswith(f"{path}, SHA-256 ")


def test_the_reference_is_computed_once_for_the_same_data(tiny, small, cache, monkeypatch):
    train_set, test_set = small
    first = score(tiny(), test_set.images(), *small)
    (path,) = (cache / "references").iterdir()

    def unexpected(self):
        raise AssertionError("the reference is computed again")

    with monkeypatch.context() as patch:
        patch.setattr(program.Scorer, "_made", unexpected)
        assert score(tiny(), test_set.images(), *small) == first
        changed = train_set.pixels.copy()
        changed[3, 1, 2] ^= 1
        with pytest.raises(AssertionError):
            score(tiny(), test_set.images(), Source("small", "train", changed, 17), test_set)
    path.write_bytes(path.read_bytes()[:-100])
    assert score(tiny(), test_set.images(), *small) == first


def test_a_killed_call_has_kept_the_features_of_a_network(run, tiny, monkeypatch):
    calls = []

    def network(train_set):
        def extract(images):
            calls.append(len(images))
            if len(calls) == 4:
                raise KeyboardInterrupt
            return Batch(np.float32(images.reshape(len(images), -1)[:, :5]), np.zeros((len(images), 2), np.float32))

        return Features(extract, sha256="of its weights")

    monkeypatch.setitem(features.FEATURES, "pixels", network)
    with pytest.raises(KeyboardInterrupt):
        program.run(tiny(quality__num_images=4), run)
    program.run(tiny(quality__num_images=4), run)
    # One image tells the dimension. The samples and the test split were done, and of the training set nothing.
    assert calls == [1, 4, 299, 1000, 1, 1000, 368]
    assert saved(run)["weights_sha256"] == "of its weights" and not (run / program.UNFINISHED).exists()


def test_the_note_on_bias_is_for_fewer_than_50_000_samples(tiny, small, monkeypatch):
    images = small[0].images(slice(10))
    assert "that of 10 samples" in score(tiny(), images, *small)["note"]
    monkeypatch.setattr(program, "USUAL_IMAGES", 10)
    assert "note" not in score(tiny(), images, *small)


def test_a_metric_is_one_entry_of_the_table(tiny, small, monkeypatch):
    """The largest feature: init, update and result, and its name appears in quality.json."""

    def largest(state, batch):
        return np.maximum(state, batch.features.max(axis=0))

    def gap(generated, reference):
        return {"gap": float(np.max(reference - generated))}

    monkeypatch.setitem(quality.METRICS, "gap", Metric(lambda dimension: np.full(dimension, -1.0), largest, gap))
    for _ in range(2):  # the second time from the cache
        scores = score(tiny(), np.zeros((2, 3, 3, 1), np.uint8), *small)
        assert scores["gap"] == 2.0 and scores["gap_test_split"] <= 2.0 and "frechet_distance" in scores


def test_a_feature_that_does_not_exist_is_named(tiny, straight):
    words = "quality.features must be one of pixels, inception, classifier, not 'pixel'; did you mean pixels?"
    with pytest.raises(ValueError, match=words.replace("?", r"\?")):
        program.run(tiny(quality__features="pixel"), straight)


def test_what_is_missing_is_said_before_anything_is_drawn(tiny, run, tmp_path):
    shutil.rmtree(run / sample.SAMPLES)
    with pytest.raises(FileNotFoundError, match="trains with --mode=classifier"):
        program.run(tiny(quality__features="classifier"), run)
    with pytest.raises(FileNotFoundError, match="there are no Inception weights at"):
        program.run(tiny(quality__features=f"inception(path='{tmp_path}/none.pth')"), run)
    with pytest.raises(FileNotFoundError, match="quality.reference='none.npz' does not exist"):
        program.run(tiny(quality__reference="none.npz"), run)
    assert not (run / sample.SAMPLES).exists()


def test_the_classifier_of_one_command_gives_every_number(tiny, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(classifiers, "MIN_STEPS", 30)
    monkeypatch.setattr(classifiers, "EPOCHS", 1)
    classifier.run(tiny(), tmp_path)
    said = json.loads(capsys.readouterr().out)
    assert said["data"] == "digits" and 0.3 < said["test_accuracy"] <= 1
    program.run(tiny(quality__features="classifier", quality__num_images=30), run)
    scores = saved(run)
    assert scores["weights_sha256"] == said["sha256"]
    assert scores["classifier_test_accuracy"] == said["test_accuracy"]
    assert scores["frechet_distance"] > scores["frechet_distance_test_split"] > 0 and scores["inception_score"] > 1
    assert scores["inception_score_train_halves"] > scores["inception_score"]


def test_during_training_the_ema_is_scored_into_the_rows_of_the_metrics(tmp_path, monkeypatch):
    monkeypatch.setitem(NETWORKS, "layer", toy.Layer)
    experiment = toy.experiment(
        quality__every=4, quality__num_images=12, train__num_steps=6, train__log_every=3, schedule__num_steps=3
    )
    state = toy.run(experiment, tmp_path)
    rows = {row["step"]: row for row in read_metrics(tmp_path)}
    assert {step for step, row in rows.items() if "frechet_distance" in row} == {4, 6} and "loss" not in rows[4]
    images = sample.make_sampler(experiment).images(experiment.model(state.ema_params), 12)
    found = score(experiment.config, images, toy.source("train"), toy.source("test"))
    for name in ("frechet_distance", "kid", "precision", "recall"):
        assert rows[6][name] == pytest.approx(found[name], rel=1e-3)
    assert "inception_score" not in rows[6] and rows[6]["loss"] > 0
