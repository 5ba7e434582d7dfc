"""Metrics of samples: how far generated images are from a reference set, by the features of both.

A metric sees all features once, batch by batch. To add one, write its three functions and a line in METRICS.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float64, UInt8

BATCH_SIZE = 1000  # images whose features are in memory at a time


class Metric(NamedTuple):
    """A metric of samples, computed from one pass over the features of both sides.

    Attributes:
        init: dimension of the features -> the state before the first batch, NumPy arrays in float64.
        update: (state, features [n, d]) -> the state after this batch.
        result: (state of the generated images, state of the reference) -> {name in quality.json: number}.
    """

    init: Callable[[int], Any]
    update: Callable[[Any, np.ndarray], Any]
    result: Callable[[Any, Any], dict[str, float]]


def frechet_distance(
    mean_1: Float[np.ndarray, " d"],
    cov_1: Float[np.ndarray, "d d"],
    mean_2: Float[np.ndarray, " d"],
    cov_2: Float[np.ndarray, "d d"],
) -> float:
    """The squared Fréchet (Wasserstein-2) distance of two Gaussians, in squared units of the features, in float64.

    |μ_1 − μ_2|² + tr(C_1 + C_2 − 2 (C_1^{1/2} C_2 C_1^{1/2})^{1/2}). Covariances may be singular.

    Source: Dowson & Landau (1982); Heusel et al. (2017), eq. 6.

    Raises:
        ValueError: a mean or a covariance holds NaN or Inf.
    """
    arguments = [np.asarray(value, np.float64) for value in (mean_1, cov_1, mean_2, cov_2)]
    if not all(np.isfinite(value).all() for value in arguments):
        raise ValueError("the mean or the covariance of the features holds NaN or Inf")
    mean_1, cov_1, mean_2, cov_2 = arguments
    # With C_i = F_i F_iᵀ the trace of the square root is the sum of the singular values of F_1ᵀ F_2. The eigenvalues
    # of C_1^{1/2} C_2 C_1^{1/2} are their squares: the root of a rounding error of 1e-16 would be 1e-8.
    overlap = np.linalg.svd(_factor(cov_1).T @ _factor(cov_2), compute_uv=False).sum()
    distance = np.sum((mean_1 - mean_2) ** 2) + np.trace(cov_1) + np.trace(cov_2) - 2 * overlap
    return max(float(distance), 0.0)  # below 0 by rounding, where the two are equal


def _factor(cov: Float64[np.ndarray, "d d"]) -> Float64[np.ndarray, "d rank"]:
    """F with F Fᵀ = C, from the eigenvalues that are more than rounding errors."""
    values, vectors = np.linalg.eigh((cov + cov.T) / 2)
    is_kept = values > len(cov) * np.finfo(np.float64).eps * values[-1]
    return vectors[:, is_kept] * np.sqrt(values[is_kept])


class Moments(NamedTuple):
    """The count, the mean and the summed outer products of deviations from the mean."""

    count: int
    mean: Float64[np.ndarray, " d"]
    scatter: Float64[np.ndarray, "d d"]


def _no_moments(dimension: int) -> Moments:
    return Moments(0, np.zeros(dimension), np.zeros((dimension, dimension)))


def _with_batch(state: Moments, features: Float64[np.ndarray, "n d"]) -> Moments:
    """Chan, Golub & LeVeque (1979): sums of squares around a mean lose no digits to a large mean."""
    num_new, batch_mean = len(features), features.mean(axis=0)
    deviations, shift = features - batch_mean, batch_mean - state.mean
    count = state.count + num_new
    between = np.outer(shift, shift) * (state.count * num_new / count)
    mean = state.mean + shift * (num_new / count)
    return Moments(count, mean, state.scatter + deviations.T @ deviations + between)


def _frechet_of_moments(generated: Moments, reference: Moments) -> dict[str, float]:
    sides = [(side.mean, side.scatter / (side.count - 1)) for side in (generated, reference)]
    return {"frechet_distance": frechet_distance(*sides[0], *sides[1])}


METRICS = {
    "frechet_distance": Metric(_no_moments, _with_batch, _frechet_of_moments),
}


def pixels(images: UInt8[np.ndarray, "n h w c"], num_levels: int) -> Float64[np.ndarray, "n d"]:
    """The images themselves, in [-1, 1]."""
    return images.reshape(len(images), -1) / ((num_levels - 1) / 2) - 1.0


# name -> (images, uint8 [n, h, w, c]; number of pixel values) -> features, float64 [n, d]
FEATURES = {"pixels": pixels}


def states(
    images: UInt8[np.ndarray, "n h w c"], num_levels: int, features: Callable[[np.ndarray, int], np.ndarray]
) -> dict[str, Any]:
    """Every metric's state after all images, at least one, in batches.

    Args:
        images: pixel values.
        num_levels: how many pixel values there are.
        features: one of FEATURES.
    """
    found: dict[str, Any] = {}
    for start in range(0, len(images), BATCH_SIZE):
        batch = features(images[start : start + BATCH_SIZE], num_levels)
        if not found:
            found = {name: metric.init(batch.shape[1]) for name, metric in METRICS.items()}
        found = {name: metric.update(found[name], batch) for name, metric in METRICS.items()}
    return found


def results(generated: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """What every metric says of the generated images, from the `states` of both sides."""
    numbers: dict[str, float] = {}
    for name, metric in METRICS.items():
        numbers |= metric.result(generated[name], reference[name])
    return numbers
