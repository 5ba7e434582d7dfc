"""TFDS builder of the bundled set: scikit-learn's 1,797 handwritten digits, 8x8 pixels, 17 grey levels."""

import io
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from sklearn import datasets
from tqdm import tqdm


class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Handwritten digits that come with scikit-learn, so there is nothing to download.

    Pixels keep the original counts 0..16. Every sixth picture (5, 11, 17, ...) is held out as the test split.
    """

    VERSION = tfds.core.Version("1.0.0")
    NUM_TRAIN = 1498
    NUM_TEST = 299

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The 8x8 handwritten digits bundled with scikit-learn, grey levels 0..16.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            homepage="https://archive.ics.uci.edu/dataset/80",
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(num_levels=17),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        held_out = np.arange(len(datasets.load_digits().images)) % 6 == 5
        return {
            "train": self._generate_examples(np.flatnonzero(~held_out)),
            "test": self._generate_examples(np.flatnonzero(held_out)),
        }

    def _generate_examples(self, indices: np.ndarray) -> Iterator[tuple[int, dict]]:
        digits = datasets.load_digits()
        for index in tqdm(indices, desc="preparing digits", leave=False):
            png = io.BytesIO()
            Image.fromarray(digits.images[index].astype(np.uint8)).save(png, "png")
            yield int(index), {"image": png.getvalue(), "label": int(digits.target[index])}


BUILDER = Digits  # of data.name=digits
