"""The Fréchet distance against closed forms and another formula, and metrics from one pass over the data."""

import numpy as np
import pytest
import scipy.linalg
from sklearn import datasets

from diffusion.evaluation import quality

DIMENSION = 12


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def random_covariance(generator, dimension=DIMENSION, rank=None):
    factor = generator.standard_normal((dimension, rank or 2 * dimension))
    return factor @ factor.T / factor.shape[1]


def rotation(generator, dimension=DIMENSION):
    return np.linalg.qr(generator.standard_normal((dimension, dimension)))[0]


def moments(features):
    return features.mean(axis=0), np.cov(features, rowvar=False)


@pytest.mark.parametrize("rank", [1, 5, DIMENSION - 1, 2 * DIMENSION])
def test_equal_gaussians_are_at_distance_0(generator, rank):
    mean, cov = generator.standard_normal(DIMENSION), random_covariance(generator, rank=rank)
    assert 0 <= quality.frechet_distance(mean, cov, mean, cov) < 1e-12


@pytest.mark.parametrize("rank", [3, 2 * DIMENSION])
def test_a_shifted_mean_costs_its_squared_length(generator, rank):
    mean, shift = generator.standard_normal((2, DIMENSION))
    cov = random_covariance(generator, rank=rank)
    found = quality.frechet_distance(mean, cov, mean + shift, cov)
    np.testing.assert_allclose(found, np.sum(shift**2), rtol=1e-12)


def test_covariances_that_commute(generator):
    """tr(C_1 + C_2 − 2 (C_1 C_2)^{1/2}) is the sum of (√a − √b)² over their common eigenvectors; some are 0."""
    axes, mean = rotation(generator), np.zeros(DIMENSION)
    a, b = generator.uniform(0, 9, (2, DIMENSION))
    a[:4], b[2:6] = 0, 0
    found = quality.frechet_distance(mean, axes * a @ axes.T, mean, axes * b @ axes.T)
    np.testing.assert_allclose(found, np.sum((np.sqrt(a) - np.sqrt(b)) ** 2), rtol=1e-12)


def test_a_singular_covariance_against_a_full_one(generator):
    """From a point of variance 0 it is the other's trace; of rank 1, u uᵀ, the overlap is √(uᵀ C u)."""
    mean, u = np.zeros(DIMENSION), generator.standard_normal(DIMENSION)
    cov = random_covariance(generator)
    point = quality.frechet_distance(mean, np.zeros_like(cov), mean, cov)
    np.testing.assert_allclose(point, np.trace(cov), rtol=1e-14)
    line = quality.frechet_distance(mean, np.outer(u, u), mean, cov)
    np.testing.assert_allclose(line, u @ u + np.trace(cov) - 2 * np.sqrt(u @ cov @ u), rtol=1e-10)
    assert quality.frechet_distance(mean, 0 * cov, mean, 0 * cov) == 0


def test_two_covariances_of_rank_1_that_do_not_commute(generator):
    """W² of u z and v z for one normal z is the smaller of |u − v|² and |u + v|²."""
    mean = np.zeros(DIMENSION)
    u, v = generator.standard_normal((2, DIMENSION))
    found = quality.frechet_distance(mean, np.outer(u, u), mean, np.outer(v, v))
    np.testing.assert_allclose(found, min(np.sum((u - v) ** 2), np.sum((u + v) ** 2)), rtol=1e-10)


def test_rounding_errors_of_eigenvalues_that_are_0_do_not_matter(generator):
    """Their roots would: √1e-16 = 1e-8 for each of them."""
    mean, cov = np.zeros(DIMENSION), random_covariance(generator, rank=2)
    other = random_covariance(generator)
    noise = 1e-17 * generator.standard_normal(cov.shape)
    clean = quality.frechet_distance(mean, cov, mean, other)
    np.testing.assert_allclose(quality.frechet_distance(mean, cov + noise, mean, other), clean, rtol=1e-13)


@pytest.mark.parametrize("dimension", [1, 2, 7, 40])
def test_the_matrix_root_of_scipy_gives_the_same(generator, dimension):
    mean_1, mean_2 = generator.standard_normal((2, dimension))
    cov_1, cov_2 = (scale * random_covariance(generator, dimension) for scale in (0.3, 5.0))
    root = scipy.linalg.sqrtm(cov_1 @ cov_2)
    wanted = np.sum((mean_1 - mean_2) ** 2) + np.trace(cov_1 + cov_2 - 2 * root.real)
    found = quality.frechet_distance(mean_1, cov_1, mean_2, cov_2)
    np.testing.assert_allclose(found, wanted, rtol=1e-8)
    np.testing.assert_allclose(found, quality.frechet_distance(mean_2, cov_2, mean_1, cov_1), rtol=1e-10)


def test_what_is_nan_is_named():
    eye, mean = np.eye(2), np.zeros(2)
    with pytest.raises(ValueError, match="NaN or Inf"):
        quality.frechet_distance(mean, eye, np.array([0.0, np.nan]), eye)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_batches_of_any_size_give_the_moments_of_all_features(generator, offset):
    metric = quality.METRICS["frechet_distance"]
    features = generator.standard_normal((100, 5)) * np.arange(1, 6) + offset
    state = metric.init(5)
    for batch in np.split(features, [1, 2, 30, 64]):
        state = metric.update(state, batch)
    mean, cov = moments(features)
    assert state.count == 100 and state.mean.dtype == state.scatter.dtype == np.float64
    np.testing.assert_allclose(state.mean, mean, rtol=1e-14)
    np.testing.assert_allclose(state.scatter / 99, cov, rtol=1e-9, atol=1e-9)


def test_a_metric_in_batches_is_that_of_all_images_at_once(generator, monkeypatch):
    images = generator.integers(0, 17, (2, 50, 3, 3, 1), np.uint8)

    def distance():
        return quality.results(*(quality.states(side, 17, quality.pixels) for side in images))["frechet_distance"]

    at_once = distance()
    monkeypatch.setattr(quality, "BATCH_SIZE", 7)
    np.testing.assert_allclose(distance(), at_once, rtol=1e-10)
    directly = [number for side in images for number in moments(quality.pixels(side, 17))]
    np.testing.assert_allclose(at_once, quality.frechet_distance(*directly), rtol=1e-10)


@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_pixels_are_the_images_in_minus_1_to_1(num_levels):
    images = np.arange(num_levels).astype(np.uint8).reshape(-1, 1, 1, 1) * np.ones((1, 2, 1, 3), np.uint8)
    features = quality.pixels(images, num_levels)
    assert features.shape == (num_levels, 6) and features.dtype == np.float64
    np.testing.assert_allclose(features, np.tile(np.linspace(-1, 1, num_levels)[:, None], 6), atol=1e-15)


def test_noise_is_farther_from_digits_than_digits_are(generator):
    digits = datasets.load_digits().images.astype(np.uint8)[..., None]
    is_held_out = np.arange(len(digits)) % 6 == 5
    noise = generator.integers(0, 17, (300, 8, 8, 1), np.uint8)
    train, test, random = (
        quality.states(s, 17, quality.pixels) for s in (digits[~is_held_out], digits[is_held_out], noise)
    )

    def distance(side):
        return quality.results(side, train)["frechet_distance"]

    assert distance(train) < 1e-9 < distance(test) < 0.1 * distance(random)
