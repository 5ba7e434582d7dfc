"""A classifier for features, trained on the data set's own labels, saved with its digest and test accuracy."""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Float32, Int32, PyTree, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from diffusion.data import Source, batch_indices
from diffusion.data.levels import to_unit
from diffusion.networks.classifier import Classifier
from diffusion.reporting.progress import Progress
from diffusion.runtime import files
from diffusion.runtime.digests import tree_sha256

BATCH_SIZE, SCORED_AT_A_TIME = 64, 500
EPOCHS, MIN_STEPS = 10, 600
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 1e-2


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The data and training of a classifier, and its accuracy on the test split."""

    data: str
    data_sha256: str  # of the training split
    image_shape: tuple[int, int, int]
    num_levels: int
    num_classes: int
    num_steps: int
    test_accuracy: float


class Trained(NamedTuple):
    """The parameters of networks.classifier.Classifier, and their provenance."""

    params: PyTree
    provenance: Provenance

    def sha256(self) -> str:
        """A digest of both."""
        facts = json.dumps(dataclasses.asdict(self.provenance), sort_keys=True)
        return hashlib.sha256(f"{tree_sha256(self.params)} {facts}".encode()).hexdigest()

    def outputs(
        self, images: UInt8[np.ndarray, "n h w c"]
    ) -> tuple[Float32[np.ndarray, "n d"], Float32[np.ndarray, "n classes"]]:
        """Features and logits of images."""
        return _outputs(self.params, images, self.provenance.num_levels, self.provenance.num_classes)


def train(train_set: Source, test_set: Source, seed: int) -> Trained:
    """Trains for ten epochs, or for 600 steps if those are more. The result depends only on the data and the seed.

    Raises:
        ValueError: the set has no labels, only one class, no test images, or an image with an unknown label.
    """
    if train_set.num_classes < 2:
        has = "one class only" if train_set.num_classes else "no labels"
        raise ValueError(f"data.name={train_set.name!r} has {has}: there is nothing to classify")
    if not len(test_set):
        raise ValueError(f"data.name={train_set.name!r} has no test images to measure the accuracy with")
    train_labels, test_labels = train_set.labels(), test_set.labels()
    network, num_levels = Classifier(train_set.num_classes), train_set.num_levels
    num_steps = max(MIN_STEPS, EPOCHS * len(train_set) // BATCH_SIZE)
    rate = optax.cosine_decay_schedule(LEARNING_RATE, num_steps)
    optimizer = optax.adamw(rate, weight_decay=WEIGHT_DECAY)

    def loss(params: PyTree, images: UInt8[Array, "b h w c"], labels: Int32[Array, " b"]) -> Float[Array, ""]:
        _, logits = network.apply({"params": params}, to_unit(images, num_levels))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params, state, images, labels):
        gradient = jax.grad(loss)(params, images, labels)
        with jax.numpy_dtype_promotion("standard"):  # Optax multiplies integer steps with floats
            updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.jit(network.init)(jax.random.key(seed), jnp.zeros((1, *train_set.image_shape)))["params"]
    state = optimizer.init(params)
    with Progress(num_steps, desc="classifier") as progress:
        for number in range(num_steps):
            chosen = batch_indices(seed, number, BATCH_SIZE, len(train_set))
            params, state = step(params, state, train_set.images(chosen), train_labels[chosen])
            progress.update()
    params = jax.device_get(params)
    _, logits = _outputs(params, test_set.images(), num_levels, train_set.num_classes)
    accuracy = float(np.mean(logits.argmax(axis=1) == test_labels))
    return Trained(
        params,
        Provenance(
            data=train_set.name,
            data_sha256=train_set.sha256(),
            image_shape=train_set.image_shape,
            num_levels=num_levels,
            num_classes=train_set.num_classes,
            num_steps=num_steps,
            test_accuracy=accuracy,
        ),
    )


def _outputs(params: PyTree, images: UInt8[np.ndarray, "n h w c"], num_levels: int, num_classes: int):
    found = [
        _compiled(params, images[begin : begin + SCORED_AT_A_TIME], num_levels, num_classes)
        for begin in range(0, len(images), SCORED_AT_A_TIME)
    ]
    features, logits = zip(*jax.device_get(found), strict=True)
    return np.concatenate(features), np.concatenate(logits)


@functools.partial(jax.jit, static_argnames=("num_levels", "num_classes"))
def _compiled(params: PyTree, images: UInt8[Array, "n h w c"], num_levels: int, num_classes: int):
    with jax.default_matmul_precision("highest"):
        return Classifier(num_classes).apply({"params": params}, to_unit(images, num_levels))


def path_of(data_sha256: str) -> Path:
    """The path of a data set's classifier, from the digest of the training split."""
    return files.cache_directory() / "classifiers" / f"{data_sha256[:32]}.safetensors"


def save(trained: Trained, path: Path) -> None:
    """Writes the parameters as safetensors, with the provenance and the digest of both as metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"facts": json.dumps(dataclasses.asdict(trained.provenance)), "sha256": trained.sha256()}
    leaves = {name: np.ascontiguousarray(leaf) for name, leaf in flatten_dict(trained.params, sep="/").items()}
    with files.replacing(path) as file:
        file.write(to_safetensors(leaves, metadata))


def load(path: Path) -> Trained:
    """The classifier in a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no classifier at {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
            leaves = {name: file.get_tensor(name) for name in file.keys()}
        facts = json.loads(metadata["facts"])
        facts["image_shape"] = tuple(facts["image_shape"])
        trained = Trained(unflatten_dict(leaves, sep="/"), Provenance(**facts))
        is_whole = trained.sha256() == metadata["sha256"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no classifier, or it is damaged ({error}); delete it and train it again"
        ) from error
    if not is_whole:
        raise ValueError(f"{path} is damaged: it is not what was saved; delete it and train it again")
    return trained
