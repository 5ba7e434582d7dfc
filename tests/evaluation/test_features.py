"""Features: pixels, Inception's, and a classifier's, with the images that each takes."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import inception as inception_benchmark
from diffusion.data import Source
from diffusion.evaluation import classifier, features
from diffusion.evaluation.features import Batch, Features
from diffusion.networks import inception
from diffusion.networks.classifier import Classifier


def source(shape=(4, 4, 1), num_levels=17, num_images=30):
    pixels = np.random.default_rng(0).integers(0, num_levels, (num_images, *shape)).astype(np.uint8)
    return Source("noise", "train", pixels, num_levels, np.arange(num_images, dtype=np.int32) % 3, 3)


@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_pixels_are_the_images_in_minus_1_to_1(num_levels):
    images = np.arange(num_levels).astype(np.uint8).reshape(-1, 1, 1, 1) * np.ones((1, 2, 1, 3), np.uint8)
    found = features.pixels(source(num_levels=num_levels)).extract(images)
    assert found.features.shape == (num_levels, 6) and found.features.dtype == np.float64 and found.logits is None
    np.testing.assert_allclose(found.features, np.tile(np.linspace(-1, 1, num_levels)[:, None], 6), atol=1e-15)


def test_images_become_8_bit_colours_by_rounding():
    grey = np.arange(17, dtype=np.uint8).reshape(17, 1, 1, 1)
    found = features.rgb(grey, 17)
    wanted = np.arange(17) * 255 / 16
    assert found.shape == (17, 1, 1, 3) and found.dtype == np.uint8
    assert np.abs(found[:, 0, 0, 0] - wanted).max() <= 0.5 and found.max() == 255
    np.testing.assert_array_equal(found, found[..., :1].repeat(3, axis=-1))
    colours = source((2, 2, 3), 256).images()
    np.testing.assert_array_equal(features.rgb(colours, 256), colours)


def test_inception_takes_these_and_says_which_weights_it_has(tmp_path, monkeypatch):
    given, path = [], tmp_path / "weights.safetensors"
    path.write_bytes(b"random")

    def fake(params, images, batch_size):
        given.append((params, images))
        return {"2048": np.ones((len(images), 2048), np.float32), "logits_unbiased": np.zeros((len(images), 1008))}

    monkeypatch.setattr(inception, "features", fake)
    monkeypatch.setattr(inception, "load", lambda path, check_digest: (path, check_digest))
    monkeypatch.setattr(inception, "digest", lambda path: f"digest of {path.name}")
    monkeypatch.setattr(inception, "published_weights", lambda: tmp_path / "published.pth")
    digits = source()
    found = features.inception(digits, str(path))
    assert found.is_fid and not features.pixels(digits).is_fid
    batch = found.extract(digits.images())
    assert batch.features.shape == (30, 2048) and batch.logits.shape == (30, 1008)
    ((params, images),) = given
    assert params == (path, False) and found.sha256 == "digest of weights.safetensors"
    np.testing.assert_array_equal(images, features.rgb(digits.images(), 17))
    published = features.inception(digits)
    published.extract(digits.images())
    assert given[-1][0] == (tmp_path / "published.pth", True) and published.sha256 == "digest of published.pth"


def test_without_pytorch_a_pytorch_file_is_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "weights.pth").write_bytes(b"what PyTorch saved")
    with pytest.raises(RuntimeError, match="PyTorch is needed for .*: pip install") as error:
        features.inception(source(), str(tmp_path / "weights.pth"))
    assert "\n" not in str(error.value)


@pytest.fixture
def untrained():
    """A function of a source: the parameters of a classifier for it."""

    def params(images):
        return Classifier(3).init(jax.random.key(0), jnp.zeros((1, *images.image_shape)))["params"]

    return params


def facts(images, **changes):
    found = {
        "data": images.name, "data_sha256": images.sha256(), "image_shape": images.image_shape,
        "num_levels": images.num_levels, "num_classes": 3, "num_steps": 0, "test_accuracy": 0.25,
    }  # fmt: skip
    return classifier.Provenance(**found | changes)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_classifier_is_found_by_its_data(untrained, cache):
    digits = source()
    with pytest.raises(FileNotFoundError, match="'classifier' needs a classifier of data.name='noise', which the same"):
        features.classifier(digits)
    trained = classifier.Trained(untrained(digits), facts(digits))
    classifier.save(trained, classifier.path_of(digits.sha256()))
    found = features.classifier(digits)
    batch = found.extract(digits.images())
    assert batch.features.shape == (30, 128) and batch.logits.shape == (30, 3)
    assert found.sha256 == trained.sha256()
    assert found.facts == {"classifier_data": "noise", "classifier_test_accuracy": 0.25}


def test_a_classifier_of_other_images_is_refused(untrained, tmp_path):
    digits, path = source(), tmp_path / "other.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no classifier at"):
        features.classifier(digits, str(path))
    classifier.save(classifier.Trained(untrained(digits), facts(digits)), path)
    features.classifier(digits, str(path))
    with pytest.raises(
        ValueError, match=r"takes images \[4, 4, 1\] of 17 pixel values, data.name='noise' has \[4, 4, 1\] of 256"
    ):
        features.classifier(source(num_levels=256), str(path))


def test_what_a_network_made_of_a_batch_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "BATCH_SIZE", 10)
    calls, images = [], source().images()

    def extract(images):
        calls.append(len(images))
        return Batch(np.float32(images.reshape(len(images), -1)), np.ones((len(images), 2), np.float32))

    network = Features(extract, sha256="abc")

    def everything():
        return np.concatenate([batch.features for batch in network.batches(images, tmp_path)])

    first = everything()
    assert calls == [10, 10, 10]
    np.testing.assert_array_equal(everything(), first)
    assert calls == [10, 10, 10]
    some, other, _ = sorted(tmp_path.iterdir())
    some.write_bytes(some.read_bytes()[:100])  # damaged
    other.unlink()
    np.testing.assert_array_equal(everything(), first)
    assert calls == 5 * [10]
    list(Features(extract, sha256="another").batches(images, tmp_path))
    assert calls == 8 * [10]
    assert len(list(tmp_path.iterdir())) == 6
    list(Features(extract).batches(images, tmp_path))  # pixels are made at once
    assert len(list(tmp_path.iterdir())) == 6


def test_the_published_layout_goes_all_the_way(tmp_path):
    """Random weights: the features are those of the network itself."""
    path = tmp_path / "random.safetensors"
    save_file(inception_benchmark.random_tensors(seed=0), path)
    digits = source()
    found = features.inception(digits, str(path), batch_size=2)
    batch = found.extract(digits.images(slice(2)))
    rgb = features.rgb(digits.images(slice(2)), 17)
    direct = inception.features(inception.load(path, check_digest=False), rgb, batch_size=2)
    np.testing.assert_array_equal(batch.features, direct["2048"])
    np.testing.assert_array_equal(batch.logits, direct["logits_unbiased"])
    assert found.sha256 == inception.digest(path)
