"""Time between the steps: instants, finer schedules, and the bound's limit T → ∞ in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from diffusion import conditioning, continuous_time, parameterizations, process, reverse, schedules
from diffusion.exact import oracles


def test_an_instant_is_the_limit_of_the_steps_that_end_there():
    schedule = schedules.cosine(20)
    fine = continuous_time.resampled(schedule, 19 * 64 + 1)
    index = np.array([5, 65, 700, 1217])
    t = jnp.asarray(1 + (index - 1) / 64, jnp.float32)
    instant, row = continuous_time.at(schedule, t), fine[index]
    for name in ("network_t", "log_snr", "sqrt_alpha_bar", "sqrt_one_minus_alpha_bar"):
        np.testing.assert_allclose(getattr(instant, name), getattr(row, name), rtol=3e-5, atol=3e-6, err_msg=name)
    np.testing.assert_allclose(instant.gamma_slope / 64, jax.vmap(process.gamma_step)(row), rtol=1e-4)
    # At whole t an instant has the step's marginals, and the slope of the step that ends there.
    whole = np.array([2, 9, 20])
    np.testing.assert_allclose(
        continuous_time.at(schedule, jnp.float32(whole)).log_snr, schedule.log_snr[whole], rtol=1e-6
    )
    for prediction in ("eps", "x0", "v"):
        p = reverse.make(prediction, "fixed_small")
        weight, of_step = (jax.vmap(lambda r: parameterizations.bound_weight(p, r))(r) for r in (instant, row))  # noqa: B023
        np.testing.assert_allclose(weight / 64, of_step, rtol=0.2, err_msg=prediction)  # Δ ≤ 0.3 of the steps
        ratio = np.expm1(jax.vmap(process.gamma_step)(row)) / jax.vmap(process.gamma_step)(row)
        np.testing.assert_allclose(weight / 64 * ratio, of_step, rtol=1e-4, err_msg=prediction)


def test_resampling_keeps_the_curve_and_its_ends():
    schedule = conditioning.on_gamma(schedules.cosine(20), -8.0, 6.0)
    same, fine = continuous_time.resampled(schedule, 20), continuous_time.resampled(schedule, 500)
    for name in ("log_snr", "network_t", "beta", "beta_tilde", "posterior_x0"):
        np.testing.assert_allclose(getattr(same, name), getattr(schedule, name), rtol=2e-5, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(fine.log_snr[np.array([1, 500])], schedule.log_snr[np.array([1, 20])], rtol=1e-6)
    scaled = 1000 * (-np.asarray(fine.log_snr[1:]) + 8.0) / 14.0
    np.testing.assert_allclose(fine.network_t[1:], scaled, rtol=1e-5, atol=1e-2)
    with pytest.raises(ValueError, match="at least 2 steps, not 1"):
        continuous_time.resampled(schedule, 1)


# --- Gaussian data with the exact denoiser, in closed form

DATA = oracles.normal(jnp.full((1, 1, 2), 0.3), jnp.array([[[0.4, 0.8]]]))
EXACT = reverse.make("eps", "fixed_small", "bayes")


def continuous_bound_nats(schedule, points_per_piece=64):
    """E of L_0 + L_∞ + L_T: the library's weight of ‖ε − ε̂‖² at evenly spaced instants, the rest in closed form."""
    num_points = points_per_piece * (schedule.num_steps - 1)
    t = 1 + (schedule.num_steps - 1) * (np.arange(num_points) + 0.5) / num_points
    rows = continuous_time.at(schedule, jnp.asarray(t, jnp.float32))
    return (schedule.num_steps - 1) * weighted_eps_errors(rows).mean() + end_terms_nats(schedule)


@jax.jit
def weights_and_variances(rows):
    weight = jax.vmap(lambda row: parameterizations.bound_weight(EXACT, row))(rows)
    return weight, jax.vmap(lambda row: DATA.posterior(row.log_snr, DATA.mean[0])[1])(rows)


def weighted_eps_errors(rows):
    """The weight times E‖ε − ε̂‖² = SNR Var(x_0 | x_t) at each row."""
    weight, x0_var = weights_and_variances(rows)
    return np.float64(weight) * np.exp(np.float64(rows.log_snr)) * np.float64(x0_var).sum(axis=(1, 2, 3))


def end_terms_nats(schedule):
    """E of the decoder's term, the density N(x_0; x_1/√ᾱ_1, e^γ_1), and of the prior's."""
    var, mean = np.float64(DATA.var[0]), np.float64(DATA.mean[0])
    gamma_1, alpha_bar = -np.float64(schedule.log_snr[1]), expit(np.float64(schedule.log_snr[-1]))
    decoder = 0.5 * (np.log(2 * np.pi) + gamma_1 + 1) * var.size
    prior = 0.5 * (alpha_bar * (var + mean**2) - alpha_bar - np.log1p(-alpha_bar)).sum()
    return decoder + prior


def exact_bound_nats(gamma_1, gamma_end):
    """½ ∫ SNR Var(x_0 | x_t) dγ = ½ Σ log (1 + s² e^{−γ_1})/(1 + s² e^{−γ_T}), since Var = s²/(1 + s² SNR)."""
    var = np.float64(DATA.var[0])
    return 0.5 * (np.log1p(var * np.exp(-gamma_1)) - np.log1p(var * np.exp(-gamma_end))).sum()


@pytest.mark.parametrize("make", [schedules.linear_gamma, schedules.cosine])
def test_the_continuous_bound_of_gaussian_data_is_its_closed_form(make):
    """Whatever the curve between the ends is: VDM, section 5.1."""
    schedule = make(60)
    gamma_1, gamma_end = -np.float64(schedule.log_snr[1]), -np.float64(schedule.log_snr[-1])
    closed = exact_bound_nats(gamma_1, gamma_end) + end_terms_nats(schedule)
    np.testing.assert_allclose(continuous_bound_nats(schedule), closed, rtol=1e-4)
    # With a far-away prior and almost clean x_1, that is the entropy of the data: the bound is tight for T → ∞.
    entropy = 0.5 * np.log(2 * np.pi * np.e * np.float64(DATA.var[0])).sum()
    gap = closed - entropy
    tight = schedules.linear_gamma(60, gamma_min=-14.0, gamma_max=14.0)
    assert gap > 0 and abs(continuous_bound_nats(tight) - entropy) < 2e-3


def test_the_discrete_bound_falls_to_the_continuous_one_as_1_over_t():
    """The library's own discrete terms, fixed_small, on refinements of one curve."""
    schedule = schedules.linear_gamma(10, gamma_min=-6.0)

    def discrete_nats(num_steps):
        fine = continuous_time.resampled(schedule, num_steps)[2:]
        return weighted_eps_errors(fine).sum()

    limit = continuous_bound_nats(schedule) - end_terms_nats(schedule)
    gaps = np.array([discrete_nats(num_steps) - limit for num_steps in (50, 99, 197)])
    assert (gaps > 0).all()
    np.testing.assert_allclose(gaps[:-1] / gaps[1:], 2, rtol=0.05)
