"""Features by which samples are compared: pixels, FID's Inception, or a classifier of the data's own classes."""

import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, UInt8

from diffusion.data import Source
from diffusion.evaluation import classifier as classifiers
from diffusion.networks import inception as inception_network
from diffusion.runtime import files

BATCH_SIZE = 1000  # images whose features are in memory at a time


class Batch(NamedTuple):
    """The input of a metric for some images: features [n, d], and logits [n, classes] if the features have them."""

    features: Float[np.ndarray, "n d"]
    logits: Float[np.ndarray, "n classes"] | None = None

    def only(self, is_in: Bool[np.ndarray, " n"]) -> "Batch":
        """The batch of some of the images."""
        return Batch(self.features[is_in], None if self.logits is None else self.logits[is_in])


class Features(NamedTuple):
    """A map from images to features.

    Attributes:
        extract: images -> their `Batch`.
        sha256: a digest of the network's weights; "" if there is no network.
        facts: further entries of quality.json about the features.
        is_fid: whether a Fréchet distance of these features is an FID.
    """

    extract: Callable[[UInt8[np.ndarray, "n h w c"]], Batch]
    sha256: str = ""
    facts: dict[str, Any] = {}
    is_fid: bool = False

    def batches(self, images: UInt8[np.ndarray, "n h w c"], folder: Path | None = None) -> Iterator[Batch]:
        """The features of all images, BATCH_SIZE at a time.

        Args:
            folder: a folder that keeps the network's output for each batch, so that stopped work can resume.
        """
        for begin in range(0, len(images), BATCH_SIZE):
            batch = images[begin : begin + BATCH_SIZE]
            yield self.extract(batch) if folder is None or not self.sha256 else self._kept(batch, folder)

    def _kept(self, images: UInt8[np.ndarray, "n h w c"], folder: Path) -> Batch:
        about = hashlib.sha256(f"{self.sha256} {images.shape}\n".encode())
        about.update(np.ascontiguousarray(images))
        path = folder / f"{about.hexdigest()}.npz"
        try:
            with np.load(path) as saved:
                return Batch(saved["features"], saved["logits"])
        except (FileNotFoundError, *files.DAMAGE):
            batch = self.extract(images)
        folder.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as file:
            np.savez(file, features=batch.features, logits=batch.logits)
        return batch


def pixels(train_set: Source) -> Features:
    """The images themselves, in [-1, 1]."""
    return Features(functools.partial(_pixels, num_levels=train_set.num_levels))


def _pixels(images: UInt8[np.ndarray, "n h w c"], num_levels: int) -> Batch:
    unit: Float64[np.ndarray, "n d"] = images.reshape(len(images), -1) / ((num_levels - 1) / 2) - 1.0
    return Batch(unit)


def inception(train_set: Source, path: str = "", batch_size: int = 8) -> Features:
    """The 2,048 features and the logits of FID's Inception.

    Grey images are repeated to three channels. Pixel values 0…L − 1 are scaled to 0…255 and rounded.

    Args:
        path: a file of weights in its layout; "" for the published weights, which are downloaded once.
        batch_size: the number of images in the network at a time.

    Raises:
        FileNotFoundError, ConnectionError: there are no weights.
        RuntimeError: PyTorch must read them first, and it is not installed.
        ValueError: they are not the published weights, are damaged, or have another layout.
    """
    file = files.expanded(path) if path else inception_network.published_weights()
    params = inception_network.load(file, check_digest=not path)

    def extract(images: UInt8[np.ndarray, "n h w c"]) -> Batch:
        found = inception_network.features(params, rgb(images, train_set.num_levels), batch_size)
        return Batch(found["2048"], found["logits_unbiased"])

    return Features(extract, inception_network.digest(file), is_fid=True)


def rgb(images: UInt8[np.ndarray, "n h w c"], num_levels: int) -> UInt8[np.ndarray, "n h w 3"]:
    """Images of one or three channels with `num_levels` pixel values, as 8-bit colour images."""
    scaled = images if num_levels == 256 else np.round(images * (255 / (num_levels - 1))).astype(np.uint8)
    return np.repeat(scaled, 3, axis=-1) if images.shape[-1] == 1 else scaled


def classifier(train_set: Source, path: str = "") -> Features:
    """The last hidden layer and the logits of a classifier that --mode=classifier trained.

    Args:
        path: its file; "" for the classifier of this data set.

    Raises:
        FileNotFoundError: it was not trained yet.
        ValueError: its file is damaged, or it takes other images.
    """
    file = files.expanded(path) if path else classifiers.path_of(train_set.sha256())
    if not path and not file.exists():
        raise FileNotFoundError(
            f"quality.features='classifier' needs a classifier of data.name={train_set.name!r}, which the same "
            "command trains with --mode=classifier"
        )
    trained = classifiers.load(file)
    about = trained.provenance
    takes, given = (about.image_shape, about.num_levels), (train_set.image_shape, train_set.num_levels)
    if takes != given:
        raise ValueError(
            f"quality.features: the classifier {file} takes images {list(takes[0])} of {takes[1]} pixel values, "
            f"data.name={train_set.name!r} has {list(given[0])} of {given[1]}"
        )

    def extract(images: UInt8[np.ndarray, "n h w c"]) -> Batch:
        return Batch(*trained.outputs(images))

    named = {"classifier_data": about.data, "classifier_test_accuracy": about.test_accuracy}
    return Features(extract, trained.sha256(), named)


# name -> (the training split, arguments of its own) -> Features; `batch_size` is the program's, not the config's
FEATURES = {"pixels": pixels, "inception": inception, "classifier": classifier}
