"""Metrics that compare sets of features: kernel distance, Inception score, precision and recall.

Each agrees with torch-fidelity's on the same features. The Fréchet distance is in a file of its own.
"""

from collections.abc import Iterator

import numpy as np
import scipy.special
from jaxtyping import Float, Float64

ROWS = 512  # images whose distances to all others are in memory at a time


def kernel_distance(
    features_1: Float[np.ndarray, "n d"],
    features_2: Float[np.ndarray, "m d"],
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """KID: the unbiased squared maximum mean discrepancy (MMD²) with the kernel (xᵀy/d + 1)³.

    Each subset takes `subset_size` images from either side, without repetition. The subsets equal torch-fidelity's if
    its rng_seed (2020 by default) is `seed`. The arithmetic is in the features' dtype, as in torch-fidelity. float32
    changes the mean by about 1e-6 and the error by 1e-4 of their size; pass float64 for more accuracy.

    Returns:
        The mean over subsets, which may be slightly below 0, and their standard deviation, torch-fidelity's `_std`. The
        latter is the error of one subset. The error of the mean is smaller, down to a tenth for 100 subsets that share
        no image.

    Raises:
        ValueError: a side has fewer than `subset_size` images, or the features hold NaN or Inf.

    Source: Bińkowski et al. (2018, arXiv 1801.01401), section 4.
    """
    features_1, features_2 = _checked(features_1), _checked(features_2)
    fewest = min(len(features_1), len(features_2))
    if not 2 <= subset_size <= fewest:
        raise ValueError(f"subset_size={subset_size} must be in 2…{fewest}, the number of images of the smaller side")
    rng, distances = np.random.RandomState(seed), []
    for _ in range(num_subsets):
        x, y = (side[rng.choice(len(side), subset_size, replace=False)] for side in (features_1, features_2))
        distances.append(_mmd2(x, y))
    return float(np.mean(distances)), float(np.std(distances))


def _mmd2(x: Float[np.ndarray, "m d"], y: Float[np.ndarray, "m d"]) -> float:
    """Gretton et al. (2012), eq. 3: an image is not compared with itself."""
    size = len(x)
    within = sum((kernel.sum(axis=1) - kernel.diagonal()).sum() for kernel in (_kernel(x, x), _kernel(y, y)))
    return float(within / (size * (size - 1)) - 2 * _kernel(x, y).sum(axis=0).sum() / size**2)


def _kernel(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "n m"]:
    return (x @ y.T * (1.0 / x.shape[1]) + 1) ** 3  # in float32, the same roundings as torch-fidelity's


def inception_score(logits: Float[np.ndarray, "n c"], splits: int = 10) -> tuple[float, float]:
    """exp(E_x KL(p(y | x) ‖ p(y))), from 1 to the number of classes, in float64.

    The images are split into equal parts in their given order. (torch-fidelity shuffles them first, unless
    samples_shuffle=False.)

    Args:
        logits: the logits of every image, whose softmax is p(y | x).
        splits: the number of parts; p(y) is the mean over one part.

    Returns:
        The mean over the parts, and their standard deviation.

    Raises:
        ValueError: fewer images than splits, or the logits hold NaN or Inf.

    Source: Salimans et al. (2016), section 4.
    """
    logits = _checked(logits).astype(np.float64)
    if not 1 <= splits <= len(logits):
        raise ValueError(f"splits={splits} must be in 1…{len(logits)}, the number of images")
    log_p = scipy.special.log_softmax(logits, axis=1)
    bounds = [part * len(logits) // splits for part in range(splits + 1)]
    scores = []
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        part = log_p[begin:end]
        log_marginal = scipy.special.logsumexp(part, axis=0, keepdims=True) - np.log(len(part))
        scores.append(np.exp(np.sum(np.exp(part) * (part - log_marginal), axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(
    generated: Float[np.ndarray, "n d"], real: Float[np.ndarray, "m d"], k: int = 3
) -> tuple[float, float]:
    """Improved precision and recall: the fraction of one side that lies on the manifold of the other, in float64.

    The manifold of a set is the union of closed balls around its features. Each ball reaches to the k-th nearest
    neighbour in the set. Precision is the fraction of generated images on the manifold of the real ones. Recall is the
    fraction of real images on the manifold of the generated ones. Memory grows with n + m, time with (n + m)² d.

    Raises:
        ValueError: a side has no k-th neighbour, or the features hold NaN or Inf.

    Source: Kynkäänniemi et al. (2019, arXiv 1904.06991), eq. 1 and 2, with the balls of each side's own images.
    """
    generated, real = (_checked(side).astype(np.float64) for side in (generated, real))
    fewest = min(len(generated), len(real))
    if not 1 <= k < fewest:
        raise ValueError(f"k={k} must be in 1…{fewest - 1}: a side has {fewest} images")
    radii_generated, radii_real = (
        # The nearest of all is the image itself.
        np.concatenate([np.partition(rows, k, axis=1)[:, k] for rows in _squared_distances(side, side)])
        for side in (generated, real)
    )
    num_precise, is_recalled, begin = 0, np.zeros(len(real), bool), 0
    for rows in _squared_distances(generated, real):
        num_precise += np.count_nonzero((rows <= radii_real[None]).any(axis=1))
        is_recalled |= (rows <= radii_generated[begin : begin + len(rows), None]).any(axis=0)
        begin += len(rows)
    return float(num_precise / len(generated)), float(is_recalled.mean())


def _squared_distances(
    x: Float64[np.ndarray, "n d"], y: Float64[np.ndarray, "m d"]
) -> Iterator[Float64[np.ndarray, "rows m"]]:
    """|x_i − y_j|², some rows at a time."""
    y_squared = np.sum(y**2, axis=1)[None]
    for begin in range(0, len(x), ROWS):
        rows = x[begin : begin + ROWS]
        squared = rows @ y.T
        squared *= -2
        squared += np.sum(rows**2, axis=1)[:, None]
        squared += y_squared
        yield np.maximum(squared, 0, out=squared)


def _checked(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    features = np.asarray(features)
    if features.ndim != 2 or not np.isfinite(features).all():
        raise ValueError(f"the features, of shape {list(features.shape)}, must be [n, d] without NaN or Inf")
    return features
