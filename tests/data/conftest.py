"""Prepared data directories for the tests of this folder."""

import io
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from diffusion.data import tfds as prepared


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing that another test decoded is found in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own_cache"))
    return tmp_path / "own_cache" / "diffusion" / "data"


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A data_dir in which the digits are prepared, for tests that only read it."""
    root = tmp_path_factory.mktemp("digits")
    prepared.prepare("digits", root)
    return root


@pytest.fixture
def digits_copy(digits_dir, tmp_path):
    """The same, to be changed."""
    shutil.copytree(digits_dir, tmp_path / "data", ignore=shutil.ignore_patterns("decoded-*", "classes-*", "index-*"))
    return tmp_path / "data"


@pytest.fixture
def write_foreign(tmp_path):
    """A function that prepares a set "foreign" in tmp_path as another TFDS builder would, and returns its pixels.

    The sizes of its pictures, (height, width), may differ where `shape` leaves them open; every split has them all.
    With `bits=16` the pictures have 16 bits, and what is returned is their upper 8.
    """

    def write(shape, key="image", sizes=4 * [(None, None)], splits=("train", "test"), bits=8):
        rng, channels = np.random.default_rng(1), shape[2]
        sizes = [(height or shape[0] or 5, width or shape[1] or 5) for height, width in sizes]
        pixels = [rng.integers(0, 256, (*size, channels), np.uint8) for size in sizes]

        class Foreign(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            VERSION = tfds.core.Version("2.1.0")

            def _info(self):
                features = tfds.features.FeaturesDict({key: tfds.features.Image(shape=shape)})
                return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples() for split in splits}

            def _generate_examples(self):
                for index, picture in enumerate(pixels):
                    png = io.BytesIO()
                    values = picture.squeeze().astype(np.uint16) * 257 if bits == 16 else picture.squeeze()
                    Image.fromarray(values).save(png, "png")
                    yield index, {key: png.getvalue()}

        Foreign(data_dir=tmp_path, file_format="array_record").download_and_prepare()
        return pixels

    return write
