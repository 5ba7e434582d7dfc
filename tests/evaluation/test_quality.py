"""Sample metrics from one pass over the data: their states, and their values for digits."""

import numpy as np
import pytest
from sklearn import datasets

from diffusion.data import Source
from diffusion.evaluation import features as features_of
from diffusion.evaluation import quality
from diffusion.evaluation.quality import Batch


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def states_of(features, logits=None, sizes=(1, 2, 30)):
    """Of all rows, in batches that begin at `sizes`."""
    parts = np.split(features, sizes)
    of_logits = [None] * len(parts) if logits is None else np.split(logits, sizes)
    return quality.states(Batch(*pair) for pair in zip(parts, of_logits, strict=True))


NAMES = {
    *("frechet_distance", "frechet_infinity", "frechet_infinity_stderr", "kid", "kid_std", "kid_subset_size"),
    *("inception_score", "inception_score_std", "precision", "recall"),
}


def test_every_number_is_that_of_all_features_at_once(generator):
    generated, real = generator.standard_normal((80, 4)), generator.standard_normal((90, 4)) + 0.5
    logits = generator.standard_normal((80, 5))
    found = quality.results(states_of(generated, logits), states_of(real, logits[:, :3].repeat(30, axis=0)[:90]))
    moments = [(side.mean(axis=0), np.cov(side, rowvar=False)) for side in (generated, real)]
    # What is kept is in float32.
    sides = [np.float64(np.float32(side)) for side in (generated, real)]
    order = np.random.RandomState(2020).permutation(80)
    wanted = {
        "frechet_distance": quality.frechet_distance(*moments[0], *moments[1]),
        "kid_subset_size": 40,
    }
    wanted["kid"], wanted["kid_std"] = quality.kernel_distance(*sides, 100, 40, seed=2020)
    wanted["precision"], wanted["recall"] = quality.precision_recall(*sides, k=3)
    wanted["inception_score"], wanted["inception_score_std"] = quality.inception_score(np.float32(logits)[order])
    wanted["frechet_infinity"], wanted["frechet_infinity_stderr"] = quality.frechet_at_infinity(sides[0], *moments[1])
    assert found.keys() == wanted.keys() == NAMES
    for name, value in wanted.items():
        # The mean and covariance of the reference are those of batches.
        np.testing.assert_allclose(found[name], value, rtol=1e-9, err_msg=name)


def test_what_few_images_or_features_without_logits_do_not_have_is_none(generator):
    few, many = states_of(generator.standard_normal((3, 4)), sizes=(1,)), states_of(generator.standard_normal((50, 4)))
    found = quality.results(few, many)
    absent = {name for name, value in found.items() if value is None}
    assert absent == NAMES - {"frechet_distance", "kid_subset_size"} and found["frechet_distance"] > 0
    with_logits = states_of(generator.standard_normal((9, 4)), generator.standard_normal((9, 2)), sizes=(4,))
    assert quality.results(with_logits, many)["inception_score"] is None


def test_a_large_set_is_compared_by_a_random_choice_that_does_not_depend_on_the_batches(generator, monkeypatch):
    monkeypatch.setattr(quality, "KEPT_IMAGES", 40)
    features = np.arange(1000.0)[:, None]
    chosen = states_of(features)[quality.see].kept.rows[:, 0]
    np.testing.assert_array_equal(states_of(features, sizes=(500, 501))[quality.see].kept.rows[:, 0], chosen)
    assert len(chosen) == 40 and (np.diff(chosen) > 0).all()
    # The mean of 40 out of 1,000 without repetition has a standard deviation of 45.
    assert abs(chosen.mean() - 499.5) < 3 * 45 and chosen.max() > 900 and chosen.min() < 100
    few = states_of(features[:40])[quality.see].kept.rows[:, 0]
    np.testing.assert_array_equal(few, features[:40, 0])  # nothing to choose, so all of them in their order
    assert states_of(features)[quality.see].moments.count == 1000
    monkeypatch.setattr(quality, "COMPARED_IMAGES", 30)
    compared = quality.as_reference(states_of(features))[quality.see].kept.rows[:, 0]
    assert len(compared) == 30 and set(compared) < set(chosen)


def test_metrics_with_one_update_share_their_state(generator):
    assert len(states_of(generator.standard_normal((50, 2)))) == 2 < len(quality.METRICS)


def test_noise_is_farther_from_digits_than_digits_are(generator, monkeypatch):
    monkeypatch.setattr(quality, "KID_SUBSETS", 5)
    digits = datasets.load_digits().images.astype(np.uint8)[..., None]
    is_held_out = np.arange(len(digits)) % 6 == 5
    noise = generator.integers(0, 17, (300, 8, 8, 1), np.uint8)
    source = Source("digits", "train", digits[~is_held_out], 17)
    pixels = features_of.pixels(source)
    train, test, random = (quality.states(pixels.batches(s)) for s in (source.images(), digits[is_held_out], noise))
    itself, held_out, far = (quality.results(side, train) for side in (train, test, random))
    distances = [found["frechet_distance"] for found in (itself, held_out, far)]
    assert distances[0] < 1e-9 < distances[1] < 0.1 * distances[2]
    assert abs(itself["kid"]) < 0.01 < 0.1 * far["kid"] and held_out["kid"] < 0.1 * far["kid"]
    assert itself["precision"] == itself["recall"] == 1
    assert held_out["precision"] > 0.8 > far["precision"] and held_out["recall"] > 0.5 > far["recall"]
