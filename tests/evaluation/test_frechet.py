"""The Fréchet distance against closed forms and another formula, its moments, and its extrapolation."""

import numpy as np
import pytest
import scipy.linalg

from diffusion.evaluation import frechet, quality

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
    features = generator.standard_normal((100, 5)) * np.arange(1, 6) + offset
    state = frechet.no_moments(5)
    for batch in np.split(features, [1, 2, 30, 64]):
        state = frechet.add_to_moments(state, batch)
    mean, cov = moments(features)
    assert state.count == 100 and state.mean.dtype == state.scatter.dtype == np.float64
    np.testing.assert_allclose(state.mean, mean, rtol=1e-14)
    np.testing.assert_allclose(state.cov, cov, rtol=1e-9, atol=1e-9)


# --- at infinitely many samples


def extrapolated(generator, num_samples, repetitions, gap=0.2, dimension=8):
    """The finite distance, the extrapolated one and its stated error, of Gaussians that are known; and the truth."""
    mean, scale = np.full(dimension, gap), np.linspace(1, 1 + gap, dimension)
    reference = np.zeros(dimension), np.eye(dimension)
    rows = []
    for _ in range(repetitions):
        samples = mean + scale * generator.standard_normal((num_samples, dimension))
        found = frechet.frechet_at_infinity(samples, *reference)
        rows.append((quality.frechet_distance(*moments(samples), *reference), found.distance, found.stderr))
    return np.array(rows), quality.frechet_distance(mean, np.diag(scale**2), *reference)


def test_it_is_free_of_the_bias_of_few_samples_and_its_error_is_honest(generator):
    rows, truth = extrapolated(generator, num_samples=200, repetitions=100)
    finite, infinite, stderr = rows.T
    tolerance = 3 * infinite.std() / np.sqrt(len(rows))
    assert finite.mean() - truth > tolerance > abs(infinite.mean() - truth)
    # With one subset of each size it would be 0.4 times the spread.
    assert 0.8 < stderr.mean() / infinite.std() < 1.3


def test_classes_in_turn_do_not_sort_the_subsets_by_class(generator):
    """Every fifth sample is far away, so the fifths of the samples would be too, without a shuffle."""
    samples = generator.standard_normal((500, 3))
    samples[::5] += 20
    shuffled = samples[generator.permutation(500)]
    one, two = (frechet.frechet_at_infinity(s, np.zeros(3), np.eye(3)) for s in (samples, shuffled))
    assert abs(one.distance - two.distance) < 5 * two.stderr and one.stderr < 3 * two.stderr


def test_its_distances_are_those_of_the_accurate_formula(generator, monkeypatch):
    """On singular covariances, where the roots of rounding errors are largest."""
    samples = generator.standard_normal((400, 3)) @ generator.standard_normal((3, 12)) + 1
    reference = np.zeros(12), random_covariance(generator, rank=5)
    fast = frechet.frechet_at_infinity(samples, *reference)

    def accurate(one, two):
        return frechet._distance(frechet._factored(one.mean, one.cov), two)

    monkeypatch.setattr(frechet, "_fast_distance", accurate)
    np.testing.assert_allclose(fast, frechet.frechet_at_infinity(samples, *reference), rtol=1e-5)


def test_all_samples_are_a_further_size_where_only_a_part_is_kept(generator):
    samples, reference = generator.standard_normal((400, 3)) + 1, (np.zeros(3), np.eye(3))
    of_all = frechet.add_to_moments(frechet.no_moments(3), samples)
    part = frechet.frechet_at_infinity(samples[:100], *reference)
    assert frechet.frechet_at_infinity(samples[:100], *reference, of_all=of_all).stderr < part.stderr
    assert frechet.frechet_at_infinity(samples, *reference, of_all=of_all) == frechet.frechet_at_infinity(
        samples, *reference
    )


def test_too_few_samples_for_their_dimension_have_none(generator):
    samples = generator.standard_normal((45, 10))
    assert frechet.frechet_at_infinity(samples, np.zeros(10), np.eye(10)) is not None
    assert frechet.frechet_at_infinity(samples[:44], np.zeros(10), np.eye(10)) is None
