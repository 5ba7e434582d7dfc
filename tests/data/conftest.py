"""Prepared data directories for the tests of this folder."""

import io
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from diffusion.data import tfds as prepared


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A data_dir in which the digits are prepared, for tests that only read it."""
    root = tmp_path_factory.mktemp("digits")
    prepared.prepare("digits", root)
    return root


@pytest.fixture
def digits_copy(digits_dir, tmp_path):
    """The same, to be changed."""
    shutil.copytree(digits_dir, tmp_path / "data", ignore=shutil.ignore_patterns("decoded-*", "classes-*"))
    return tmp_path / "data"


@pytest.fixture
def write_foreign(tmp_path):
    """(shape, key) -> a set "foreign" of four pictures per split in tmp_path, as another TFDS builder prepares it."""

    def write(shape, key="image"):
        size = [length or 5 for length in shape]
        pixels = np.random.default_rng(1).integers(0, 256, (4, *size), np.uint8)

        class Foreign(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            VERSION = tfds.core.Version("2.1.0")

            def _info(self):
                features = tfds.features.FeaturesDict({key: tfds.features.Image(shape=shape)})
                return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples(), "test": self._generate_examples()}

            def _generate_examples(self):
                for index, picture in enumerate(pixels):
                    png = io.BytesIO()
                    Image.fromarray(picture.squeeze()).save(png, "png")
                    yield index, {key: png.getvalue()}

        Foreign(data_dir=tmp_path, file_format="array_record").download_and_prepare()
        return pixels

    return write
