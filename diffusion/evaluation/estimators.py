"""Bits/dim from a few terms per image: an unbiased estimate of the sum over all t, with its standard error.

The full evaluation is a finite table, terms[image, t], and its result is the mean over images of the row sums. Here the
table is sampled as in a survey. The decoder's term (t = 1) is always taken. For the other terms, each image takes two
independent samples. A sample has one random offset and evenly spaced points, on a scale on which every t has the length
q_t. Each term is weighted by 1/(points · q_t).

The weighted sum is unbiased for every q > 0. It varies least if q_t is proportional to the terms' root mean square,
which a few images show. Even spacing removes most of the remaining variance, since the terms vary smoothly with t. Two
samples give the standard error of the estimate.

Sources: unequal probabilities, Hansen & Hurwitz (1943); evenly spaced points, Madow (1949); two samples to know the
error, Mahalanobis (1946).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

FLOOR = 0.1  # part of q that is uniform, so that no weight exceeds 10 times the uniform one


class Estimate(NamedTuple):
    """Bits/dim of N images from a few terms of each."""

    decoder_bpd: Float[np.ndarray, " n"]  # L_0
    kl_bpd: Float[np.ndarray, " n"]  # the estimated sum of the terms of t > 1
    sampling_stderr: float  # the standard error of the images' mean, against the same images' full sum


def proposal(pilot_terms_bpd: Float[np.ndarray, "n steps"]) -> Float[np.ndarray, " steps"]:
    """The probability q_t with which each t is drawn, from every term of a few images. Entry t − 1 belongs to t.

    q_1 = 0, because the decoder's term needs no draw. For independent images and draws, q_t ∝ √E[term_t²] has the least
    variance. A part of q is uniform, in case the few images are not typical.
    """
    root_mean_square = np.sqrt(np.mean(np.asarray(pilot_terms_bpd, np.float64) ** 2, axis=0))
    root_mean_square[0] = 0.0
    uniform = np.full(len(root_mean_square), 1 / (len(root_mean_square) - 1))
    uniform[0] = 0.0
    total = root_mean_square.sum()
    return uniform if total == 0 else (1 - FLOOR) * root_mean_square / total + FLOOR * uniform


def draw_t(
    q: Float[np.ndarray, " steps"], offsets: Float[np.ndarray, "n 2"], terms_per_image: int
) -> Int[np.ndarray, "n terms"]:
    """The terms of each image to compute: t = 1, then two samples of (terms_per_image − 1)/2 from t > 1.

    Args:
        q: from `proposal`.
        offsets: uniform in [0, 1), two for each image.
        terms_per_image: an odd number ≥ 3.
    """
    points = (terms_per_image - 1) // 2
    where = (offsets[:, :, None] + np.arange(points)) / points  # [n, 2, points], in [0, 1)
    # The sum's last entry may round to below 1, and a point beyond it still belongs to the last t.
    t = np.minimum(np.searchsorted(np.cumsum(q), where, side="right") + 1, len(q))
    return np.concatenate([np.ones((len(offsets), 1), int), t.reshape(len(offsets), -1)], axis=1)


def estimate(
    terms_bpd: Float[np.ndarray, "n terms"], t: Int[np.ndarray, "n terms"], q: Float[np.ndarray, " steps"]
) -> Estimate:
    """The estimate from the terms that `draw_t` chose.

    Args:
        terms_bpd: entry [n, j] is image n's term of t[n, j], in bits/dim.
        t: from `draw_t`.
        q: from `proposal`.
    """
    num_images, points = len(t), (t.shape[1] - 1) // 2
    weighted = (terms_bpd[:, 1:] / (points * q[t[:, 1:] - 1])).reshape(num_images, 2, points)
    return Estimate(terms_bpd[:, 0], *of_two_samples(weighted.sum(axis=2)))


def of_two_samples(samples: Float[np.ndarray, "n 2"]) -> tuple[Float[np.ndarray, " n"], float]:
    """The mean of each image's two samples, and the standard error of the images' mean.

    The two samples of an image are independent with the same distribution, so a quarter of their squared difference is
    an unbiased estimate of the variance of their mean. Images are independent of one another.
    """
    variance = (samples[:, 0] - samples[:, 1]) ** 2 / 4
    return samples.mean(axis=1), float(np.sqrt(variance.sum()) / len(samples))
