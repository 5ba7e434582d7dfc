"""Averages of any length, composed of two tracked ones, equal those tracked directly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from diffusion import post_hoc_ema

NUM_STEPS, EVERY, TRACKED = 1000, 10, (0.05, 0.1)
STEPS = np.arange(1, NUM_STEPS + 1)


def weights(length, step):
    """Of θ_1…θ_n in the average at n, from eq. 127 alone: (1 − β_i) times the β after it."""
    kept = np.where(STEPS <= step, (1 - 1 / STEPS) ** (post_hoc_ema.exponent(length) + 1), 1.0)
    after = np.concatenate([np.cumprod(kept[:0:-1])[::-1], [1.0]])
    return (1 - kept) * after


@pytest.mark.parametrize("length", [0.02, 0.05, 0.1, 0.2, 0.28])
def test_a_length_is_the_standard_deviation_of_the_weights(length):
    gamma = post_hoc_ema.exponent(length)
    density = [integrate.quad(lambda u, k=k: (gamma + 1) * u ** (gamma + k), 0, 1)[0] for k in (0, 1, 2)]
    np.testing.assert_allclose([density[0], density[2] - density[1] ** 2], [1, length**2], rtol=1e-6)


def test_the_two_of_the_paper_have_its_exponents():
    """EDM2: γ = 16.97 and 6.94 for σ_rel = 0.05 and 0.10."""
    np.testing.assert_allclose([post_hoc_ema.exponent(0.05), post_hoc_ema.exponent(0.1)], [16.97, 6.94], atol=0.005)


def test_tracking_gives_the_weights_of_its_formula_and_forgets_where_it_began():
    theta = jax.random.normal(jax.random.key(0), (40, 3))

    def step(averages, at):
        n, params = at
        return post_hoc_ema.track(averages, {"w": params}, n, TRACKED), None

    begin = tuple({"w": jnp.full(3, 1e3)} for _ in TRACKED)
    averages, _ = jax.lax.scan(step, begin, (jnp.arange(1, 41), theta))
    for average, length in zip(averages, TRACKED, strict=True):
        np.testing.assert_allclose(average["w"], weights(length, 40)[:40] @ np.float64(theta), rtol=1e-4, atol=1e-6)


def composed(length, step=NUM_STEPS, every=EVERY):
    """The weights of θ_1…θ_n in the average that is composed."""
    steps = np.repeat(np.arange(every, step + 1, every), 2)
    lengths = np.tile(TRACKED, len(steps) // 2)
    factors = post_hoc_ema.coefficients(steps, lengths, step, length)
    np.testing.assert_allclose(factors.sum(), 1)
    return factors @ np.stack([weights(length, step) for length, step in zip(lengths, steps, strict=True)])


@pytest.mark.parametrize(("length", "step"), [(0.05, 1000), (0.06, 1000), (0.075, 1000), (0.09, 700), (0.1, 1000)])
def test_a_length_between_the_two_is_that_tracked_directly(length, step):
    """To 1e-6 on parameters that move smoothly, of which a hundred averages were kept twice; and near it on a walk."""
    difference = composed(length, step) - weights(length, step)
    smooth = np.stack([np.tanh(3 * STEPS / NUM_STEPS), np.sin(STEPS / 200), np.log1p(STEPS)])
    assert np.abs(smooth @ difference).max() < 1e-6
    walk = np.cumsum(np.random.default_rng(0).normal(size=(20, NUM_STEPS)), axis=1) / NUM_STEPS**0.5
    assert np.abs(walk @ difference).max() < 4e-6


@pytest.mark.parametrize("length", TRACKED)
def test_a_tracked_length_is_itself_however_few_were_kept(length):
    np.testing.assert_allclose(composed(length, every=500), weights(length, NUM_STEPS), atol=1e-12)


def test_more_that_was_kept_is_nearer():
    errors = [np.linalg.norm(composed(0.15, every=every) - weights(0.15, NUM_STEPS)) for every in (100, 50, 20, 10)]
    assert (np.diff(errors) < 0).all() and errors[-1] < 0.05 * errors[0]


@pytest.mark.parametrize(("length", "every"), [(0.03, 500), (0.07, 500), (0.2, 500), (0.2, 50), (0.1, 500)])
def test_the_misfit_is_the_distance_of_the_weights(length, every):
    steps = np.repeat(np.arange(every, NUM_STEPS + 1, every), 2)
    kept = steps, np.tile(TRACKED, len(steps) // 2), NUM_STEPS, length
    found = post_hoc_ema.misfit(post_hoc_ema.coefficients(*kept), *kept)
    wanted = weights(length, NUM_STEPS)
    by_step = np.linalg.norm(composed(length, every=every) - wanted) / np.linalg.norm(wanted)
    np.testing.assert_allclose(found, by_step, rtol=0.03, atol=1e-6)  # integrals against sums of 1,000 steps
