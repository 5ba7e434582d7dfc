"""The reference for samples, computed once and kept under a digest of everything that it depends on."""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float32

from diffusion.evaluation import distances, features, frechet, quality
from diffusion.evaluation.frechet import Moments
from diffusion.networks import inception
from diffusion.runtime import files

Numbers = dict[str, float | int | None]


class Reference(NamedTuple):
    """The metrics' states of the reference set, and the metrics of real images, for scale.

    Attributes:
        states: the states of the reference set.
        scale: the metrics of real images against the reference.
        others: features of the split that is not the reference, for comparison in sets as large as the samples'.
    """

    states: quality.States
    scale: Numbers
    others: Float32[np.ndarray, "n d"]


def cached(facts: dict[str, str], dimension: int, make: Callable[[], Reference]) -> Reference:
    """The reference that `make` computes, or the kept one if it was computed before.

    Args:
        facts: everything that it depends on. The facts, the metrics and the metrics' code determine the file name.
        dimension: the dimension of the features.

    Raises:
        OSError: the kept reference cannot be read. (A damaged one is computed again, and one that cannot be written is
            not kept; a warning says so.)
    """
    modules = distances, features, frechet, inception, quality
    code = [hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest() for module in modules]
    about = json.dumps([facts, sorted(quality.METRICS), code], sort_keys=True)
    try:
        folder = files.cache_directory() / "references"
    except FileNotFoundError as error:
        logging.warning("%s; what is computed of the reference is not kept", error)
        return make()
    path = folder / f"{hashlib.sha256(about.encode()).hexdigest()[:32]}.npz"
    if path.exists():
        try:
            return _load(path, dimension)
        except files.DAMAGE as error:
            logging.warning("%s is damaged (%s); it is computed again", path, error)
    reference = make()
    try:
        _save(path, reference)
    except OSError as error:
        logging.warning("%s; it will be computed again", error)
    return reference


def _save(path: Path, reference: Reference) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    leaves = jax.tree.leaves(list(reference.states.values()))
    with files.replacing(path) as file:
        np.savez(file, *leaves, others=reference.others, scale=json.dumps(reference.scale))


def _load(path: Path, dimension: int) -> Reference:
    # In the order of METRICS, as `quality.states` makes them.
    empty = {metric.update: metric.init(dimension) for metric in quality.METRICS.values()}
    with np.load(path) as saved:
        scale, others = json.loads(str(saved["scale"])), saved["others"]
        leaves = [saved[f"arr_{number}"] for number in range(len(saved.files) - 2)]
    leaves = [leaf if leaf.ndim else leaf.item() for leaf in leaves]
    states = jax.tree.unflatten(jax.tree.structure(list(empty.values())), leaves)
    return Reference(dict(zip(empty, states, strict=True)), scale, others)


def published(path: Path, dimension: int) -> quality.States:
    """The states of a set with known mean and covariance only. Metrics that compare images give None.

    Args:
        path: an .npz file with `mu` [d] and `sigma` [d, d].
        dimension: the dimension d of the features.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"quality.reference={str(path)!r} does not exist")
    try:
        with np.load(path) as saved:
            mean, cov = (np.asarray(saved[name], np.float64) for name in ("mu", "sigma"))
    except files.DAMAGE as error:
        raise ValueError(f"quality.reference={str(path)!r} is no .npz file with mu and sigma ({error})") from error
    if mean.shape != (dimension,) or cov.shape != (dimension, dimension):
        raise ValueError(
            f"quality.reference={str(path)!r} has mu {list(mean.shape)} and sigma {list(cov.shape)}, "
            f"but quality.features gives {dimension} numbers"
        )
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError(f"quality.reference={str(path)!r} holds NaN or Inf")
    states = {metric.update: metric.init(dimension) for metric in quality.METRICS.values()}
    # How many images there were is not known. Of two, the scatter is the covariance, which alone is asked for.
    states[quality.see] = states[quality.see]._replace(moments=Moments(2, mean, cov))
    return states
