"""The data's own classifier: it learns, depends only on data and seed, and is saved completely or refused."""

import dataclasses

import numpy as np
import pytest

from diffusion import data
from diffusion.data import Source
from diffusion.evaluation import classifier
from diffusion.evaluation.classifier import Provenance, Trained
from diffusion.runtime.digests import tree_sha256


def bars(split, num_images=64, num_classes=2):
    """Images with one bright column (class 0) or row (class 1)."""
    pixels, labels = np.zeros((num_images, 8, 8, 1), np.uint8), np.arange(num_images, dtype=np.int32) % 2
    rng = np.random.default_rng(split == "test")
    for image, label in zip(pixels, labels, strict=True):
        (image.swapaxes(0, 1) if label == 0 else image)[rng.integers(8)] = rng.integers(100, 256)
    return Source("bars", split, pixels, 256, labels, num_classes)


@pytest.fixture(scope="module")
def trained():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "MIN_STEPS", 40)
        patch.setattr(classifier, "EPOCHS", 1)
        return [classifier.train(bars("train"), bars("test"), seed) for seed in (0, 0, 1)]


def test_it_learns_and_says_how_well(trained):
    provenance = trained[0].provenance
    assert provenance.test_accuracy > 0.95
    assert provenance == Provenance("bars", bars("train").sha256(), (8, 8, 1), 256, 2, 40, provenance.test_accuracy)
    _, logits = trained[0].outputs(bars("test").images())
    assert np.mean(logits.argmax(axis=1) == bars("test").labels()) == provenance.test_accuracy


def test_it_is_a_function_of_the_data_and_the_seed(trained):
    one, again, other = (tree_sha256(one.params) for one in trained)
    assert one == again != other


def test_outputs_do_not_depend_on_the_batch(trained, monkeypatch):
    images = bars("test").images()
    features, logits = trained[0].outputs(images)
    assert features.shape == (64, 128) and features.min() == 0 and (features > 0).any(axis=0).mean() > 0.2
    monkeypatch.setattr(classifier, "SCORED_AT_A_TIME", 10)
    for found, wanted in zip(trained[0].outputs(images), (features, logits), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_what_is_saved_comes_back(trained, tmp_path):
    path = tmp_path / "classifiers" / "bars.safetensors"
    classifier.save(trained[0], path)
    again = classifier.load(path)
    assert again.provenance == trained[0].provenance and again.sha256() == trained[0].sha256()
    assert tree_sha256(again.params) == tree_sha256(trained[0].params)


@pytest.mark.parametrize("change", ["cut", "flip", "foreign"])
def test_a_damaged_file_is_refused(trained, tmp_path, change):
    path = tmp_path / "bars.safetensors"
    classifier.save(trained[0], path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 16
    path.write_bytes({"cut": content[:1000], "flip": content, "foreign": b"no weights"}[change])
    with pytest.raises(ValueError, match="bars.safetensors is .*damaged.*; delete it and train it again"):
        classifier.load(path)


def test_what_is_known_of_it_belongs_to_its_digest(trained):
    better = dataclasses.replace(trained[0].provenance, test_accuracy=1.0001)
    assert Trained(trained[0].params, better).sha256() != trained[0].sha256()


def test_without_two_classes_there_is_nothing_to_learn():
    unlabelled = dataclasses.replace(bars("train"), classes=None, num_classes=0)
    with pytest.raises(ValueError, match="data.name='bars' has no labels: there is nothing to classify"):
        classifier.train(unlabelled, bars("test"), 0)
    with pytest.raises(ValueError, match="data.name='bars' has one class only"):
        classifier.train(bars("train", num_classes=1), bars("test"), 0)


def test_without_test_images_nothing_is_trained(monkeypatch):
    monkeypatch.setattr(classifier, "Progress", None)
    with pytest.raises(ValueError, match="data.name='bars' has no test images"):
        classifier.train(bars("train"), bars("test", num_images=0), 0)


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_unknown_label_is_refused_and_is_not_the_last_class(split):
    sets = {name: bars(name) for name in ("train", "test")}
    sets[split] = dataclasses.replace(sets[split], classes=np.full(64, -1, np.int32))
    with pytest.raises(ValueError, match=f"64 of 64 labels of the {split} split are not in 0…1"):
        classifier.train(sets["train"], sets["test"], 0)


@pytest.mark.slow
def test_it_recognises_digits(tiny_data_dir):
    train_set, test_set = (data.load("digits", split, tiny_data_dir) for split in ("train", "test"))
    assert classifier.train(train_set, test_set, 0).provenance.test_accuracy > 0.95
