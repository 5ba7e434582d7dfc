"""Inception's features: equal to torch-fidelity's for images of all sizes, whatever else is in the batch."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import inception as benchmark
from diffusion.networks import inception

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "inception.npz"))
SIZES = sorted({name.split("/")[0] for name in GOLDEN})
# The error of float32 is 9e-7. Sums in another order, on another processor, may leave a few times that.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def params(made_once):
    def write(directory):
        save_file(benchmark.random_tensors(seed=0), directory / "random.safetensors")

    return inception.load(made_once("inception", write) / "random.safetensors", check_digest=False)


def features(params, images):
    """Two at a time, of which one is missing where a test has one image: the network takes a second for eight."""
    return inception.features(params, images, batch_size=2)


def relative_error(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("size", SIZES)
def test_features_equal_those_of_torch_fidelity(params, size):
    """Its own in float64, from tests/golden/inception.py."""
    found = features(params, benchmark.random_images(1, *map(int, size.split("x"))))
    assert list(found) == list(inception.DIMENSIONS)
    for name, values in found.items():
        assert values.dtype == np.float32 and values.shape == (1, inception.DIMENSIONS[name])
        assert relative_error(values, GOLDEN[f"{size}/{name}"]) < TOLERANCE


def test_features_of_an_image_do_not_depend_on_the_batch(params):
    images = benchmark.random_images(3, 16)
    together = features(params, images)
    for name, values in features(params, images[2:]).items():
        np.testing.assert_array_equal(values[0], together[name][2])
        assert relative_error(together[name][0], together[name][1]) > 10 * TOLERANCE


def test_no_images_have_no_features(params):
    found = features(params, np.zeros((0, 8, 8, 3), np.uint8))
    assert {name: values.shape[1] for name, values in found.items()} == inception.DIMENSIONS
    assert not any(len(values) for values in found.values())


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((2, 8, 8, 3), np.int64),
        np.zeros((2, 8, 8, 1), np.uint8),
        np.zeros((2, 3, 8, 8), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((2, 0, 8, 3), np.uint8),
    ],
)
def test_other_images_are_refused(params, images):
    with pytest.raises(ValueError, match=rf"uint8 images \[n, h, w, 3\], not {images.dtype} \["):
        features(params, images)


def test_other_weights_give_what_torch_fidelity_gives(tmp_path):
    """Where both are installed; a file that PyTorch wrote, with the tensors that nobody needs."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("torch_fidelity")
    module = benchmark.torch_fidelity(benchmark.random_tensors(seed=1))
    torch.save(module.state_dict(), tmp_path / "random.pth")
    params = inception.load(tmp_path / "random.pth", check_digest=False)
    for height, width in ((8, 8), (33, 64), (299, 299)):
        images = np.random.default_rng().integers(0, 256, (2, height, width, 3), np.uint8)
        found, wanted = features(params, images), benchmark.peer_features(module, images)
        for name in inception.DIMENSIONS:
            assert relative_error(found[name], wanted[name]) < TOLERANCE
