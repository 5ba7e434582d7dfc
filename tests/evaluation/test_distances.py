"""KID, Inception score, precision and recall: equal to torch-fidelity's, to their definitions, and to known values."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from diffusion.evaluation import distances, quality

GOLDEN = Path(__file__).parents[1] / "golden"
SPEC = importlib.util.spec_from_file_location("golden_sample_metrics", GOLDEN / "sample_metrics.py")
golden = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(golden)


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def ours(generated, real):
    """The numbers of `golden.numbers`, by our functions."""

    def moments(features):
        return features.mean(axis=0), np.cov(features, rowvar=False)

    subsets, size, seed = (golden.KID[name] for name in ("kid_subsets", "kid_subset_size", "rng_seed"))
    kid, kid_std = quality.kernel_distance(generated, real, subsets, size, seed)
    score, score_std = quality.inception_score(generated, golden.SPLITS)
    order = np.random.RandomState(2020).permutation(len(generated))
    shuffled, shuffled_std = quality.inception_score(generated[order], golden.SPLITS)
    found = {
        "fid": quality.frechet_distance(*moments(generated), *moments(real)),
        "kid": kid,
        "kid_std": kid_std,
        "inception_score": score,
        "inception_score_std": score_std,
        "shuffled_inception_score": shuffled,
        "shuffled_inception_score_std": shuffled_std,
    }
    for k in golden.NEIGHBOURS:
        found[f"precision_{k}"], found[f"recall_{k}"] = quality.precision_recall(generated, real, k)
    return found


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        # torch-fidelity gives precision and recall in float32.
        np.testing.assert_allclose(found[name], value, rtol=1e-7 if "_" in name else 1e-9, err_msg=name)


@pytest.mark.parametrize("dimension", golden.DIMENSIONS)
def test_numbers_that_torch_fidelity_printed(dimension):
    saved = np.load(GOLDEN / "sample_metrics.npz")
    wanted = {name.partition("/")[2]: saved[name] for name in saved.files if name.startswith(f"{dimension}/")}
    assert_equal(ours(*golden.features(dimension)), wanted)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_that_torch_fidelity_gives_of_new_features(dtype):
    pytest.importorskip("torch_fidelity")
    rng = np.random.default_rng()
    generated, real = (rng.standard_normal((n, 40)).astype(dtype) + shift for n, shift in ((150, 0.1), (120, 0)))
    found, wanted = ours(generated.astype(dtype), real), golden.numbers(generated.astype(dtype), real)
    if dtype == np.float32:  # its Fréchet distance is in the features' precision
        np.testing.assert_allclose(found.pop("fid"), wanted.pop("fid"), rtol=1e-3)
    assert_equal(found, wanted)


# --- KID


def test_the_kernel_distance_of_the_only_subset_is_its_definition(generator):
    x, y = generator.standard_normal((2, 6, 3))

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    wanted = np.mean([k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs]) - 2 * np.mean([k(a, b) for a in x for b in y])
    mean, spread = quality.kernel_distance(x, y, num_subsets=4, subset_size=6)
    np.testing.assert_allclose(mean, wanted, rtol=1e-12)
    assert spread < 1e-12


def test_it_is_unbiased(generator):
    """0 on average for two samples of one distribution, however few."""
    found = [quality.kernel_distance(*generator.standard_normal((2, 5, 4)), 1, 5)[0] for _ in range(2000)]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found)) and min(found) < 0


def test_the_seed_chooses_the_subsets(generator):
    x, y = generator.standard_normal((2, 30, 3))
    found = [quality.kernel_distance(x, y, 5, 10, seed) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("size", [1, 21])
def test_a_subset_that_a_side_cannot_fill_is_refused(generator, size):
    x, y = generator.standard_normal((30, 3)), generator.standard_normal((20, 3))
    with pytest.raises(ValueError, match=f"subset_size={size} must be in 2…20"):
        quality.kernel_distance(x, y, subset_size=size)


# --- Inception score


def test_the_score_of_sure_and_balanced_classes_is_their_number_and_of_guesses_1():
    sure = 1000.0 * np.eye(7)[np.arange(70) % 7]
    assert quality.inception_score(sure) == pytest.approx((7, 0), abs=1e-12)
    assert quality.inception_score(np.zeros((70, 7))) == pytest.approx((1, 0), abs=1e-12)
    assert quality.inception_score(np.ones((70, 1))) == pytest.approx((1, 0), abs=1e-12)  # a single class
    assert quality.inception_score(np.repeat(sure, 10, axis=0)[np.argsort(np.arange(700) % 70)], splits=1)[0] > 6.99


def test_a_part_has_a_marginal_of_its_own():
    """Sorted by class, no part has more than one class."""
    assert quality.inception_score(1000.0 * np.repeat(np.eye(10), 5, axis=0))[0] == pytest.approx(1)


def test_more_splits_than_images_are_refused():
    with pytest.raises(ValueError, match="splits=10 must be in 1…9"):
        quality.inception_score(np.zeros((9, 3)))


# --- precision and recall


def by_loops(generated, real, k):
    def radius(side, i):
        return sorted(np.linalg.norm(side[i] - other) for other in side)[k]

    def covered(point, side):
        return any(np.linalg.norm(point - centre) <= radius(side, i) for i, centre in enumerate(side))

    return np.mean([covered(x, real) for x in generated]), np.mean([covered(x, generated) for x in real])


@pytest.mark.parametrize("k", [1, 3])
def test_they_are_what_their_definition_says_in_blocks_of_any_size(generator, monkeypatch, k):
    generated, real = generator.standard_normal((25, 2)), generator.standard_normal((31, 2)) * [1, 3]
    wanted = by_loops(generated, real, k)
    assert 0 < min(wanted) and max(wanted) < 1
    for rows in (512, 7):
        monkeypatch.setattr(distances, "ROWS", rows)
        assert quality.precision_recall(generated, real, k) == pytest.approx(wanted)
    assert quality.precision_recall(real, generated, k) == pytest.approx(wanted[::-1])


def test_a_set_against_itself_and_against_one_that_is_far_away(generator):
    x = generator.standard_normal((40, 3))
    assert quality.precision_recall(x, x.copy()) == (1, 1)
    assert quality.precision_recall(x, x + 100) == (0, 0)


def test_the_boundary_belongs_to_the_manifold():
    """Points at integers reach to their third neighbour: the outer ones over 3, exactly to the other set."""
    real, generated = np.arange(6.0)[:, None], np.arange(6.0)[:, None] + 8
    assert quality.precision_recall(generated, real) == (1 / 6, 1 / 6)


@pytest.mark.parametrize("k", [0, 3, 4])
def test_a_neighbour_that_a_side_does_not_have_is_refused(generator, k):
    x, y = generator.standard_normal((3, 2)), generator.standard_normal((9, 2))
    with pytest.raises(ValueError, match=f"k={k} must be in 1…2"):
        quality.precision_recall(x, y, k)


def test_features_that_are_nan_are_refused(generator):
    good = generator.standard_normal((40, 3))
    bad = good.copy()
    bad[3, 1] = np.nan
    for metric in (
        lambda: quality.kernel_distance(bad, good, subset_size=9),
        lambda: quality.kernel_distance(good, bad, subset_size=9),
        lambda: quality.inception_score(bad),
        lambda: quality.precision_recall(bad, good),
        lambda: quality.precision_recall(good, bad),
    ):
        with pytest.raises(ValueError, match="without NaN or Inf"):
            metric()
