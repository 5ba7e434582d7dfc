"""Metrics of samples: the distance of generated images from a reference set, by the features of both.

A metric sees all features once, batch by batch. To add a metric, write its three functions and a line in METRICS.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Float64

from diffusion.evaluation.distances import inception_score, kernel_distance, precision_recall
from diffusion.evaluation.features import FEATURES, Batch
from diffusion.evaluation.frechet import (
    Moments,
    add_to_moments,
    frechet_at_infinity,
    frechet_distance,
    frechet_of_subsets,
    no_moments,
)

__all__ = [
    "FEATURES",
    "METRICS",
    "Batch",
    "Metric",
    "States",
    "frechet_at_infinity",
    "frechet_distance",
    "inception_score",
    "kept_features",
    "kernel_distance",
    "as_reference",
    "at_equal_n",
    "precision_recall",
    "results",
    "states",
    "updated",
]

# A random choice of so many images is kept, and of so many of those each is compared with each.
KEPT_IMAGES, COMPARED_IMAGES = 50_000, 10_000
# The usual choices. With this seed the subsets and the order of images are those of torch-fidelity.
KID_SUBSETS, KID_SUBSET_SIZE, SEED = 100, 1000, 2020
SPLITS, NEIGHBOUR = 10, 3


States = dict[Callable, Any]  # of the metrics, by the `update` that makes them


class Metric(NamedTuple):
    """A metric of samples, computed from one pass over the features of both sides.

    Attributes:
        init: dimension of the features -> the state before the first batch, a tuple of arrays and numbers.
        update: (state, batch) -> the state after this batch. Metrics with the same `update` share their state.
        result: (state of the generated images, state of the reference) -> {name in quality.json: number}. A number that
            these images cannot have is None.
    """

    init: Callable[[int], Any]
    update: Callable[[Any, Batch], Any]
    result: Callable[[Any, Any], dict[str, float | int | None]]


class Kept(NamedTuple):
    """A random choice of rows in their order: the rows with the smallest uniform random numbers.

    The random number depends only on the row's position, so the choice does not depend on the batches.
    """

    count: int  # rows seen
    numbers: Float64[np.ndarray, " kept"]
    rows: Float32[np.ndarray, "kept d"]


def _none_kept(dimension: int) -> Kept:
    return Kept(0, np.zeros(0), np.zeros((0, dimension), np.float32))


def _keep(state: Kept, rows: Float[np.ndarray, "n d"], most: int) -> Kept:
    numbers = np.random.Generator(np.random.PCG64(0).advance(state.count)).random(len(rows))
    numbers = np.concatenate([state.numbers, numbers])
    all_rows = np.concatenate([state.rows, np.asarray(rows, np.float32)])
    return _fewer(Kept(state.count + len(rows), numbers, all_rows), most)


def _fewer(state: Kept, most: int) -> Kept:
    if len(state.rows) <= most:
        return state
    chosen = np.sort(np.argpartition(state.numbers, most)[:most])
    return Kept(state.count, state.numbers[chosen], state.rows[chosen])


class Seen(NamedTuple):
    """The statistics of a set's features that most metrics need."""

    moments: Moments
    kept: Kept


def nothing_seen(dimension: int) -> Seen:
    return Seen(no_moments(dimension), _none_kept(dimension))


def see(state: Seen, batch: Batch) -> Seen:
    return Seen(add_to_moments(state.moments, batch.features), _keep(state.kept, batch.features, KEPT_IMAGES))


def as_reference(states: States) -> States:
    """The same statistics without the images that are never compared with generated ones."""
    seen = states.get(see)
    return states if seen is None else states | {see: seen._replace(kept=_fewer(seen.kept, COMPARED_IMAGES))}


def _frechet(generated: Seen, reference: Seen) -> dict[str, float | None]:
    one, two = generated.moments, reference.moments
    return {"frechet_distance": frechet_distance(one.mean, one.cov, two.mean, two.cov)}


def _at_infinity(generated: Seen, reference: Seen) -> dict[str, float | None]:
    two = reference.moments
    found = frechet_at_infinity(generated.kept.rows, two.mean, two.cov, of_all=generated.moments)
    distance, stderr = found or (None, None)
    return {"frechet_infinity": distance, "frechet_infinity_stderr": stderr}


def at_equal_n(features: Float[np.ndarray, "n d"], reference: States, size: int) -> dict[str, float | None]:
    """The Fréchet distance at `size` images, the mean over disjoint subsets. It compares with other distances at this
    size.
    """
    two = reference[see].moments
    distance, stderr = frechet_of_subsets(features, size, two.mean, two.cov)
    return {"frechet_equal_n": distance, "frechet_equal_n_stderr": stderr}


def _kernel(generated: Seen, reference: Seen) -> dict[str, float | int | None]:
    sides = [np.float64(_fewer(side.kept, COMPARED_IMAGES).rows) for side in (generated, reference)]
    # Of all images of a side there is one subset only.
    size = min(KID_SUBSET_SIZE, *(len(side) // 2 for side in sides))
    mean, spread = kernel_distance(*sides, KID_SUBSETS, size, SEED) if size >= 2 else (None, None)
    return {"kid": mean, "kid_std": spread, "kid_subset_size": size}


def _neighbours(generated: Seen, reference: Seen) -> dict[str, float | None]:
    sides = [_fewer(side.kept, COMPARED_IMAGES).rows for side in (generated, reference)]
    is_possible = min(map(len, sides)) > NEIGHBOUR
    precision, recall = precision_recall(*sides, NEIGHBOUR) if is_possible else (None, None)
    return {"precision": precision, "recall": recall}


def _no_logits(dimension: int) -> Kept:
    return _none_kept(0)


def _keep_logits(state: Kept, batch: Batch) -> Kept:
    if batch.logits is None:
        return state
    return _keep(state if state.count else _none_kept(batch.logits.shape[1]), batch.logits, KEPT_IMAGES)


def _inception_score(generated: Kept, reference: Kept) -> dict[str, float | None]:
    if len(generated.rows) < SPLITS:
        return {"inception_score": None, "inception_score_std": None}
    # Samples may come sorted by class, of which every part should have its share.
    order = np.random.RandomState(SEED).permutation(len(generated.rows))
    mean, spread = inception_score(generated.rows[order], SPLITS)
    return {"inception_score": mean, "inception_score_std": spread}


METRICS = {
    "frechet_distance": Metric(nothing_seen, see, _frechet),
    "frechet_at_infinity": Metric(nothing_seen, see, _at_infinity),
    "kernel_distance": Metric(nothing_seen, see, _kernel),
    "inception_score": Metric(_no_logits, _keep_logits, _inception_score),
    "precision_recall": Metric(nothing_seen, see, _neighbours),
}


def updated(states: States, batch: Batch) -> States:
    """The state of every metric after a batch; {} stands for the states before the first batch."""
    if not len(batch.features):
        return states
    before = states or {metric.update: metric.init(batch.features.shape[1]) for metric in METRICS.values()}
    return {update: update(state, batch) for update, state in before.items()}


def states(batches: Iterable[Batch]) -> States:
    """The state of every metric after all batches, of which there is at least one."""
    found: States = {}
    for batch in batches:
        found = updated(found, batch)
    return found


def kept_features(of: States) -> Float32[np.ndarray, "kept d"]:
    """The features of the kept images, at most COMPARED_IMAGES."""
    return _fewer(of[see].kept, COMPARED_IMAGES).rows


def results(generated: States, reference: States, names: Iterable[str] | None = None) -> dict[str, float | int | None]:
    """The metrics of the generated images, by default all, from the states of both sides."""
    numbers: dict[str, float | int | None] = {}
    for metric in (METRICS[name] for name in names or METRICS):
        numbers |= metric.result(generated[metric.update], reference[metric.update])
    return numbers
