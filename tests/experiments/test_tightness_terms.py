"""The gap of the bound, the model's error and the looseness, each from its own integrals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import schedules
from experiments import tightness_terms as study

THETAS = {
    "start": study.START,
    "bent": np.array([[0.5, 0.6, 2.0, -0.1, -2.0], [0.3, 0.7, 1.5, 0.2, -1.0], [0.2, 0.4, -1.0, 0.1, -0.5]]),
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("theta", THETAS.values(), ids=THETAS.keys())
@pytest.mark.parametrize("name", study.SCHEDULES)
def test_both_terms_are_nonnegative_and_sum_to_the_gap(theta, name):
    q = study.forward(study.SCHEDULES[name], study.MODES)
    error, looseness = study.terms(jnp.asarray(theta), q)
    assert error > 0.01 and looseness.shape == (3,) and np.all(looseness > -1e-12)
    np.testing.assert_allclose(error + looseness.sum(), study.gap(jnp.asarray(theta), q), rtol=1e-9)


def test_a_finer_grid_changes_nothing():
    theta = jnp.asarray(THETAS["bent"])
    coarse, fine = (
        study.both(theta, study.forward(study.SCHEDULES["unsuitable"], study.MODES, np.linspace(-7, 7, points)))
        for points in (141, 561)
    )
    np.testing.assert_allclose(coarse, fine, rtol=1e-7)


def test_gaussian_chains_have_their_closed_form():
    """Where all is linear, q and p_θ are Gaussians of (x_0, …, x_3), and divergences are of matrices."""
    schedule = schedules.from_betas([0.2, 0.5, 0.7])
    theta = np.array([[0.8, 0.0, 1.0, 0.1, -1.5], [0.6, 0.0, 1.0, 0.0, -0.7], [0.4, 0.0, 1.0, -0.2, -0.3]])
    mean, var = (table.item() for table in study.GAUSSIAN[1:])
    mean_q, cov_q = chain([(np.sqrt(1 - beta), 0.0, beta) for beta in (0.2, 0.5, 0.7)], mean, var)
    mean_p, cov_p = chain([(a, d, study.LEAST_VAR + np.exp(s)) for a, _, _, d, s in theta[::-1]], 0.0, 1.0)
    mean_p, cov_p = mean_p[::-1], cov_p[::-1, ::-1]  # drawn from x_3 to x_0
    whole = divergence(mean_q, cov_q, mean_p, cov_p)
    of_x0 = divergence(mean_q[:1], cov_q[:1, :1], mean_p[:1], cov_p[:1, :1])
    found = study.both(jnp.asarray(theta), study.forward(schedule, study.GAUSSIAN))
    np.testing.assert_allclose(found, [whole, of_x0, whole - of_x0], rtol=1e-6)


def chain(links, mean, var):
    """Mean and covariance of z_0 ~ N(mean, var) and z_k = a z_{k−1} + b + √v ε."""
    means, factor = [mean], np.sqrt(var) * np.eye(1, len(links) + 1)
    for k, (a, b, v) in enumerate(links, start=1):
        means.append(a * means[-1] + b)
        factor = np.vstack([factor, a * factor[-1] + np.sqrt(v) * np.eye(len(links) + 1)[k]])
    return np.array(means), factor @ factor.T


def divergence(mean_q, cov_q, mean_p, cov_p):
    inverse, away = np.linalg.inv(cov_p), mean_p - mean_q
    log_ratio = np.linalg.slogdet(cov_p)[1] - np.linalg.slogdet(cov_q)[1]
    return 0.5 * (np.trace(inverse @ cov_q) - len(away) + away @ inverse @ away + log_ratio)


def test_the_bound_rises_and_log_p_falls():
    """From θ of the best log p on, each update raises the bound, and the model's error grows twentyfold."""
    best = [[-0.03, 1.09, 3.32, 0.0, -2.78], [0.87, 1.48, 2.23, 0.05, -1.96], [0.03, -0.05, 0.95, 0.31, 0.51]]
    q = study.forward(study.SCHEDULES["suitable"], study.MODES)
    path, falls = study.descend(lambda theta: study.gap(theta, q), jnp.asarray(best), 300, rate=0.005)
    (gap, error, _), (gap_after, error_after, _) = (study.both(jnp.asarray(path[k]), q) for k in (0, -1))
    assert falls and gap_after < 0.1 * gap and 0.006 < error * 10 < error_after


def test_training_ends_tight_where_the_family_holds_the_reversal(monkeypatch):
    """Of one Gaussian: both terms go to 0, and not before. The table has a line for each θ."""
    monkeypatch.setattr(study, "TRAININGS", (study.TRAININGS[0]._replace(num_updates=1500),))
    found = study.gaussian_row()
    first, last = (found["terms"]["suitable"][k] for k in (0, -1))
    assert found["falls"] and min(first) > 1 and max(last) < 1e-3
    assert len(study.table([found], found).splitlines()) == 2 + 2 + 4
