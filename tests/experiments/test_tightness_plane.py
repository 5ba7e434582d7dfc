"""The 2-D quadratures: the cost of a diagonal covariance, against closed forms and the 1-D study."""

import numpy as np
import pytest

from diffusion import schedules
from experiments import tightness_known, tightness_plane


def test_correlated_gaussian_data_have_their_closed_form():
    """With the full covariance nothing is lost; the diagonal one loses −½ log(1 − correlation²) at each step."""
    cov = np.array([[0.5, 0.3], [0.3, 0.4]])
    data = tightness_plane.Plane(np.ones(1), np.zeros((1, 2)), cov[None])
    schedule = schedules.harmonic(6)
    found = tightness_plane.gaps(data, schedule, tightness_plane.grid(points=151))
    # Along the eigenvectors of the data's covariance every step is a product of two Gaussians.
    lost, alpha_bar = 0.0, np.float64(schedule.alpha_bar)
    values, vectors = np.linalg.eigh(cov)
    for t in range(1, 7):
        beta, noise = 1 - alpha_bar[t] / alpha_bar[t - 1], 1 - alpha_bar[t]
        of_x0 = np.sqrt(alpha_bar[t - 1]) * beta / noise
        along = beta * (1 - alpha_bar[t - 1]) / noise + of_x0**2 * values * noise / (alpha_bar[t] * values + noise)
        of_step = vectors @ np.diag(along) @ vectors.T
        lost -= 0.5 * np.log(1 - of_step[0, 1] ** 2 / (of_step[0, 0] * of_step[1, 1]))
    assert found["full"] == pytest.approx(0.0, abs=1e-7)
    assert found["diagonal"] == pytest.approx(lost, rel=1e-5)


def test_independent_dimensions_cost_what_one_dimension_costs_twice(monkeypatch):
    weight, mean, var = (np.array(numbers) for numbers in ([0.3, 0.7], [-1.0, 0.6], [0.25, 0.16]))
    monkeypatch.setattr(tightness_known, "LINE", tuple(table[:, None] for table in (weight, mean, var)))
    pairs = [(i, j) for i in range(2) for j in range(2)]
    data = tightness_plane.Plane(
        np.array([weight[i] * weight[j] for i, j in pairs]),
        np.array([[mean[i], mean[j]] for i, j in pairs]),
        np.array([np.diag([var[i], var[j]]) for i, j in pairs]),
    )
    schedule = schedules.cosine(10)
    found = tightness_plane.gaps(data, schedule, tightness_plane.grid())
    once = {name: sum(parts) for name, parts in tightness_known.line_gaps(schedule).items()}
    assert found["full"] == pytest.approx(found["diagonal"], abs=1e-6)
    assert found["diagonal"] == pytest.approx(2 * once["exact"], rel=1e-4)
    assert found["constant"] == pytest.approx(2 * once["optimal"], rel=1e-4)


def test_a_diagonal_covariance_costs_one_over_t_and_a_full_one_less():
    x = tightness_plane.grid(points=151)
    short, long = (
        tightness_plane.gaps(tightness_plane.CORRELATED, schedules.cosine(num_steps), x) for num_steps in (20, 40)
    )
    assert 1.7 < short["diagonal"] / long["diagonal"] < 2.3
    assert short["full"] / long["full"] > 3.3
    assert long["full"] < long["diagonal"] < long["constant"]
