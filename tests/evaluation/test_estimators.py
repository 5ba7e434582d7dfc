"""The estimate of the bound from a few terms: it is unbiased, and its standard error is right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import likelihood, reverse, schedules
from diffusion.evaluation import estimators

NUM_IMAGES, NUM_STEPS = 64, 1000


@pytest.fixture(scope="module")
def table():
    """Every term of 64 images of different contrast, under the exact denoiser of one contrast."""
    schedule, p = schedules.linear(NUM_STEPS), reverse.make("x0", "fixed_large")
    contrast = jnp.linspace(0.1, 0.5, NUM_IMAGES).reshape(-1, 1, 1, 1)
    x0 = contrast * jax.random.normal(jax.random.key(0), (NUM_IMAGES, 8, 8, 1))
    x0 = jnp.round((jnp.clip(x0, -1, 1) + 1) * 127.5) / 127.5 - 1
    keys = jax.random.split(jax.random.key(1), NUM_IMAGES)

    def denoise(x_t, network_t):  # E[x_0 | x_t] for x_0 ~ N(0, 0.3² I)
        alpha_bar = schedule.alpha_bar[network_t.astype(int) + 1].reshape(-1, 1, 1, 1)
        return jnp.sqrt(alpha_bar) * 0.09 / (alpha_bar * 0.09 + 1 - alpha_bar) * x_t

    return np.asarray(likelihood.vlb_terms_bpd(denoise, p, schedule, x0, keys)[0], np.float64)


def estimate_from(table, q, offsets, terms_per_image):
    t = estimators.draw_t(q, offsets, terms_per_image)
    return estimators.estimate(np.take_along_axis(table, t - 1, axis=1), t, q)


def mean_bpd(estimate):
    return (estimate.decoder_bpd + estimate.kl_bpd).mean()


@pytest.mark.parametrize("terms_per_image", [3, 9])
def test_the_average_over_all_offsets_is_the_full_sum(terms_per_image):
    """For every image by itself and whatever the proposal; some t are drawn several times at once."""
    rng = np.random.default_rng(0)
    image = rng.exponential(size=12)
    grid = (np.arange(100_000) + 0.5) / 100_000
    for pilot in (image[None], rng.exponential(size=(2, 12)) ** 4):
        q = estimators.proposal(pilot)
        np.testing.assert_allclose(q.sum(), 1.0, rtol=1e-12)
        assert q[0] == 0 and (q[1:] > 0).all()
        offsets = np.stack([grid, grid[::-1]], axis=1)
        every = estimate_from(np.broadcast_to(image, (len(grid), 12)), q, offsets, terms_per_image)
        np.testing.assert_allclose(every.kl_bpd.mean(), image[1:].sum(), rtol=2e-4)
        np.testing.assert_array_equal(every.decoder_bpd, image[0])


def test_200_repeats_cover_the_full_sum_at_the_stated_rate(table):
    full, q = table.sum(axis=1).mean(), estimators.proposal(table[::8])
    errors, stated = [], []
    for repeat in range(200):
        offsets = np.random.default_rng(repeat).uniform(size=(len(table), 2))
        estimate = estimate_from(table, q, offsets, terms_per_image=9)
        errors.append(mean_bpd(estimate) - full)
        stated.append(estimate.sampling_stderr)
    errors, stated = np.array(errors), np.array(stated)
    # Of 200 intervals of 95%, 190 ± 3.1 hold the full sum; of 200 of 68.3%, 137 ± 6.6.
    assert 180 <= np.sum(np.abs(errors) < 1.96 * stated) <= 199
    assert 117 <= np.sum(np.abs(errors) < stated) <= 157
    assert abs(errors.mean()) < 3 * errors.std() / 200**0.5
    np.testing.assert_allclose(np.sqrt(np.mean(stated**2)), errors.std(), rtol=0.2)


def test_one_percent_of_the_terms_is_enough_for_a_hundredth_of_a_bit(table):
    """For 10,000 images; the error falls with the root of their number."""
    offsets = np.random.default_rng(1).uniform(size=(NUM_IMAGES, 2))
    good = estimate_from(table, estimators.proposal(table[::8]), offsets, terms_per_image=9)
    assert good.sampling_stderr * (NUM_IMAGES / 10_000) ** 0.5 < 0.01
    uniform = estimate_from(table, estimators.proposal(np.ones((1, NUM_STEPS))), offsets, terms_per_image=9)
    assert good.sampling_stderr < uniform.sampling_stderr / 3  # what the pilot is for


def test_extreme_offsets_stay_within_the_table():
    q = estimators.proposal(np.random.default_rng(0).uniform(size=(1, 7)))
    offsets = np.array([[0.0, np.nextafter(1.0, 0.0)]])
    t = estimators.draw_t(q, offsets, 3)
    assert t.tolist() == [[1, 2, 7]]
    np.testing.assert_allclose(estimators.proposal(np.zeros((3, 7))), [0] + [1 / 6] * 6)
