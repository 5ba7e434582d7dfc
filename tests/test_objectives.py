"""Losses: their means over t, what they train, and how t is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import likelihood, objectives, process, reverse, schedules, timesteps

S = schedules.cosine(40)
X0 = jnp.round(jax.random.uniform(jax.random.key(0), (4, 4, 1), minval=-1.0) * 8) / 8
EPS = jax.random.normal(jax.random.key(1), X0.shape)


def problem(prediction, variance):
    return objectives.Problem(reverse.make(prediction, variance), S.num_steps, num_levels=17)


@pytest.mark.parametrize("prediction", list(reverse.PREDICTIONS))
def test_simple_vanishes_for_a_perfect_network_only(prediction):
    pr = problem(prediction, "fixed_small")
    x_t = process.q_sample(S[9], X0, EPS)
    perfect = pr.p.target(S[9], X0, x_t, EPS)
    assert objectives.simple(pr, S[9], X0, x_t, EPS, perfect)[0] == 0
    np.testing.assert_allclose(objectives.simple(pr, S[9], X0, x_t, EPS, perfect + 0.5)[0], 0.25, rtol=1e-5)


def test_vlb_averages_over_t_to_the_bound():
    pr = problem("eps", "learned_range")
    output = lambda x_t: jnp.concatenate([0.7 * x_t, jnp.zeros_like(x_t)], -1)  # noqa: E731
    x_t = jax.vmap(lambda row: process.q_sample(row, X0, EPS))(S[1:])
    one = lambda row, x_t: objectives.vlb(pr, row, X0, x_t, EPS, output(x_t))[0]  # noqa: E731
    term = lambda row, x_t: likelihood.vlb_term_bpd(pr.p, row, X0, x_t, output(x_t), 17, clip_x0=False)  # noqa: E731
    losses, terms = jax.vmap(one)(S[1:], x_t), jax.vmap(term)(S[1:], x_t)
    np.testing.assert_allclose(losses.mean(), terms.sum(), rtol=1e-5)


def test_hybrid_lets_the_bound_train_the_variance_only():
    pr = problem("eps", "learned_range")
    x_t = process.q_sample(S[9], X0, EPS)
    output = jax.random.normal(jax.random.key(3), (4, 4, 2))
    gradient = lambda objective: jax.grad(lambda out: objective(pr, S[9], X0, x_t, EPS, out)[0])(output)  # noqa: E731
    hybrid, simple, vlb = (gradient(f) for f in (objectives.hybrid, objectives.simple, objectives.vlb))
    np.testing.assert_allclose(hybrid[..., :1], simple[..., :1], rtol=1e-6)
    np.testing.assert_allclose(hybrid[..., 1:], 0.001 * vlb[..., 1:], rtol=1e-5)


@pytest.mark.parametrize("draw", timesteps.SAMPLERS.values())
def test_every_t_is_drawn_equally_often(draw):
    t = jax.vmap(lambda key: draw(key, 16, 10))(jax.random.split(jax.random.key(0), 2000))
    counts = np.bincount(np.asarray(t).ravel(), minlength=11)
    assert counts[0] == 0 and len(counts) == 11
    # 32,000 draws: a count's standard deviation is at most √(3200 · 0.9) = 54; allow 4.
    np.testing.assert_allclose(counts[1:], 3200, atol=4 * 54)


def test_low_discrepancy_fills_every_stratum_in_every_batch():
    for i in range(50):
        t = np.sort(timesteps.low_discrepancy(jax.random.key(i), 20, 100))
        assert np.diff(t).max() <= 6 and np.diff(t).min() >= 4  # 100/20 = 5 apart, up to rounding
