"""The Fréchet distance between two Gaussians, from streamed moments, and its limit for infinitely many samples."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64

# The subsets of the extrapolation are the samples divided by 1, 2, … and 5, at least by 1, 2 and 3.
DIVISORS, FEWEST_DIVISORS = 5, 3
MOST_SUBSETS = 5  # whose mean distance is taken
IMAGES_PER_DIMENSION = 1.5  # of the smallest subsets; the bias of fewer images is not proportional to 1/n


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
    return _distance(_factored(mean_1, cov_1), _factored(mean_2, cov_2))


class FactoredGaussian(NamedTuple):
    """A Gaussian, represented by a factor F of its covariance C = F Fᵀ."""

    mean: Float64[np.ndarray, " d"]
    factor: Float64[np.ndarray, "d rank"]
    trace: float


def _factored(mean: Float[np.ndarray, " d"], cov: Float[np.ndarray, "d d"]) -> FactoredGaussian:
    mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError("the mean or the covariance of the features holds NaN or Inf")
    values, vectors = np.linalg.eigh((cov + cov.T) / 2)
    is_kept = values > len(cov) * np.finfo(np.float64).eps * values[-1]  # the others are rounding errors
    return FactoredGaussian(mean, vectors[:, is_kept] * np.sqrt(values[is_kept]), float(np.trace(cov)))


def _distance(one: FactoredGaussian, two: FactoredGaussian) -> float:
    # The trace of the square root is the sum of the singular values of F_1ᵀ F_2. The eigenvalues of
    # C_1^{1/2} C_2 C_1^{1/2} are their squares: the root of a rounding error of 1e-16 would be 1e-8.
    overlap = np.linalg.svd(one.factor.T @ two.factor, compute_uv=False).sum()
    distance = np.sum((one.mean - two.mean) ** 2) + one.trace + two.trace - 2 * overlap
    return max(float(distance), 0.0)  # below 0 by rounding, where the two are equal


def _fast_distance(one: "Moments", two: FactoredGaussian) -> float:
    """A fifth of the work: of Fᵀ C F the eigenvalues alone, whose roots are less accurate, up to 1e-8 each."""
    values = np.linalg.eigvalsh(two.factor.T @ one.cov @ two.factor)
    overlap = np.sqrt(np.maximum(values, 0)).sum()
    return float(np.sum((one.mean - two.mean) ** 2) + np.trace(one.cov) + two.trace - 2 * overlap)


class Moments(NamedTuple):
    """The count, the mean and the summed outer products of deviations from the mean."""

    count: int
    mean: Float64[np.ndarray, " d"]
    scatter: Float64[np.ndarray, "d d"]

    @property
    def cov(self) -> Float64[np.ndarray, "d d"]:
        return self.scatter / (self.count - 1)


def no_moments(dimension: int) -> Moments:
    return Moments(0, np.zeros(dimension), np.zeros((dimension, dimension)))


def add_to_moments(state: Moments, features: Float[np.ndarray, "n d"]) -> Moments:
    """Chan, Golub & LeVeque (1979): sums of squares around a mean lose no digits to a large mean."""
    features = np.asarray(features, np.float64)
    num_new, batch_mean = len(features), features.mean(axis=0)
    deviations, shift = features - batch_mean, batch_mean - state.mean
    count = state.count + num_new
    between = np.outer(shift, shift) * (state.count * num_new / count)
    mean = state.mean + shift * (num_new / count)
    return Moments(count, mean, state.scatter + deviations.T @ deviations + between)


class Estimate(NamedTuple):
    """A distance and its standard error, which is None for a single set."""

    distance: float
    stderr: float | None


def frechet_of_subsets(
    samples: Float[np.ndarray, "n d"], size: int, mean: Float[np.ndarray, " d"], cov: Float[np.ndarray, "d d"]
) -> Estimate:
    """The mean distance between disjoint subsets of `size` samples, at most MOST_SUBSETS, and a known Gaussian.

    The distance of n samples is biased by about c/n, so two sets of images compare only at an equal n. The standard
    error treats the subsets as independent. It does not contain the error of the reference, which all subsets share.
    """
    order = np.random.default_rng(0).permutation(len(samples))
    num_subsets = min(MOST_SUBSETS, len(samples) // size)
    reference, moments = _factored(mean, cov), no_moments(samples.shape[1])
    subsets = [np.sort(order[first * size : (first + 1) * size]) for first in range(num_subsets)]
    distances = [_fast_distance(add_to_moments(moments, samples[subset]), reference) for subset in subsets]
    stderr = float(np.std(distances, ddof=1) / num_subsets**0.5) if num_subsets > 1 else None
    return Estimate(float(np.mean(distances)), stderr)


def frechet_at_infinity(
    samples: Float[np.ndarray, "n d"],
    mean: Float[np.ndarray, " d"],
    cov: Float[np.ndarray, "d d"],
    of_all: Moments | None = None,
) -> Estimate | None:
    """FID∞: the distance between infinitely many samples and a known Gaussian, in float64.

    The distance of n samples is biased by about c/n. The samples are split into 1, 2, … and up to 5 disjoint subsets,
    as long as each has 1.5 samples per dimension. This gives 15 distances at 5 sizes, or fewer. A line in 1/n is fitted
    to them, weighted by n, because the variance falls as 1/n. The result is its value at 1/n = 0, which may be slightly
    below 0 if the truth is near 0. The standard error is that of the fit. On Gaussians this error is right to 10% or
    too large. With one subset of each size, as in the paper, it would be less than half of the truth, because those
    subsets share their samples.

    Args:
        samples: features.
        mean, cov: the moments of the reference. The error from its own finite size stays in the result.
        of_all: the moments of all samples, if `samples` are a part of them; they add one more size.

    Returns:
        None if there are fewer than 4.5 samples for each dimension, because a third of them would be too few.

    Source: Chong & Forsyth (2020, arXiv 1911.07023), section 3.
    """
    num_samples, dimension = samples.shape
    most = min(DIVISORS, int(num_samples / (IMAGES_PER_DIMENSION * dimension)))
    if most < FEWEST_DIVISORS:
        return None
    # Samples may come with their classes in turn or sorted, and every subset should have all of them.
    shuffled = samples[np.random.default_rng(0).permutation(num_samples)]
    subsets = [shuffled[first::divisor] for divisor in range(1, most + 1) for first in range(divisor)]
    moments = [add_to_moments(no_moments(dimension), subset) for subset in subsets]
    if of_all is not None and of_all.count > num_samples:
        moments.append(of_all)
    reference = _factored(mean, cov)
    sizes = np.array([float(one.count) for one in moments])
    distances = [_fast_distance(one, reference) for one in moments]
    (_, intercept), errors = np.polyfit(1 / sizes, distances, 1, w=np.sqrt(sizes), cov=True)
    return Estimate(float(intercept), float(np.sqrt(errors[1, 1])))
