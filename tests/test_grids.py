"""Grids of noise levels: their levels, rounded to the chain's steps or between them, and their marginals."""

import numpy as np
import pytest

from diffusion import conditioning, grids, schedules

LINEAR = schedules.linear(1000)
BETWEEN = conditioning.on_gamma(schedules.linear(50), -8.0, 6.0)


def gamma(schedule):
    return -np.asarray(schedule.log_snr[1:], np.float64)


def sigma_by_hand(num_steps, schedule, rho):
    """Karras et al. (2022), eq. 5, from the noisiest level on; σ is the noise of x/√ᾱ."""
    low, high = np.exp(gamma(schedule)[[0, -1]] / 2)
    i = np.arange(num_steps)
    return (high ** (1 / rho) + i / (num_steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def wanted(name, num_steps, schedule):
    """γ of the levels before they are rounded, in increasing order."""
    if name == "log_snr":
        return np.linspace(*gamma(schedule)[[0, -1]], num_steps)
    return 2 * np.log(sigma_by_hand(num_steps, schedule, 3.0 if "rho" in name else 7.0))[::-1]


GRIDS = {
    "log_snr": grids.log_snr,
    "karras": grids.karras,
    "karras, rho = 3": lambda *args, **more: grids.karras(*args, rho=3.0, **more),
}
every_grid = pytest.mark.parametrize("name", GRIDS)


@every_grid
def test_each_level_is_rounded_to_the_step_of_the_nearest_log_snr(name):
    found = GRIDS[name](LINEAR, 10)
    t = 1 + np.asarray(found.network_t[1:], int)
    distances = np.abs(gamma(LINEAR) - wanted(name, 10, LINEAR)[:, None])
    np.testing.assert_array_equal(t, 1 + distances.argmin(axis=1))
    assert (t[0], t[-1]) == (1, 1000)
    # The chain's own steps: its marginals at these t.
    np.testing.assert_allclose(found.alpha_bar[1:], LINEAR.alpha_bar[t], rtol=1e-6)


@every_grid
@pytest.mark.parametrize("num_steps", [1, 2, 300, 999, 1000])
def test_there_are_as_many_different_steps_as_wanted_and_the_noisiest_is_the_last_latent(name, num_steps):
    """Near the data the linear schedule's own steps are further apart than 300 even levels of log SNR."""
    t = 1 + np.asarray(GRIDS[name](LINEAR, num_steps).network_t[1:], int)
    assert len(t) == num_steps and (np.diff(t) > 0).all() and t[-1] == 1000
    assert num_steps == 1 or t[0] == 1


@every_grid
def test_a_continuous_grid_has_the_levels_themselves_and_tells_the_network_so(name):
    found = GRIDS[name](BETWEEN, 12, continuous=True)
    np.testing.assert_allclose(gamma(found), wanted(name, 12, BETWEEN), rtol=1e-4, atol=1e-4)
    # This network is conditioned on γ, scaled to 0…1000 between −8 and 6.
    np.testing.assert_allclose(found.network_t[1:], 1000 * (gamma(found) + 8) / 14, rtol=1e-4, atol=0.02)
    np.testing.assert_allclose(found.beta_tilde[2:], -np.expm1(-np.diff(gamma(found))) / (
        1 + np.exp(-gamma(found)[:-1])
    ), rtol=1e-3)  # fmt: skip


def test_the_limits_of_rho():
    """ρ = 1 has equal distances of σ; ρ → ∞ has equal distances of log SNR."""
    even = np.exp(gamma(grids.karras(BETWEEN, 6, rho=1.0, continuous=True)) / 2)
    np.testing.assert_allclose(np.diff(even), np.diff(even).mean(), rtol=1e-3)
    almost, limit = grids.karras(BETWEEN, 6, rho=1e6, continuous=True), grids.log_snr(BETWEEN, 6, continuous=True)
    np.testing.assert_allclose(gamma(almost), gamma(limit), rtol=1e-4, atol=1e-4)


@every_grid
def test_what_no_grid_can_be_is_refused(name):
    with pytest.raises(ValueError, match="log SNR_T = −∞; take sample.grid='even'"):
        GRIDS[name](schedules.harmonic(10), 4)
    for num_steps in (0, 1001):
        with pytest.raises(ValueError, match=f"cannot keep {num_steps} of 1000 steps"):
            GRIDS[name](LINEAR, num_steps)
    with pytest.raises(ValueError, match="at least 2 steps, not 1"):
        GRIDS[name](BETWEEN, 1, continuous=True)


def test_a_rho_below_one_is_refused():
    with pytest.raises(ValueError, match="rho must be at least 1, not 0.5"):
        grids.karras(LINEAR, 10, rho=0.5)
