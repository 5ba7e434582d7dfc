"""The order of each sampler: its error with twice as many steps, for Gaussian data with the exact denoiser.

If a step is affine and its noise Gaussian, the means and variances follow from the step itself, without samples.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import samplers, schedules
from diffusion.exact import oracles
from diffusion.samplers import PastStep, StepState

DATA = oracles.normal(jnp.full((1, 1, 1), 0.3), jnp.full((1, 1, 1), 0.5))
LOG_SNR = np.linspace(8, -8, 321)
ALPHA_BAR = 1 / (1 + np.exp(-LOG_SNR))
EVEN_IN_LOG_SNR = schedules.from_betas(1 - ALPHA_BAR / np.concatenate([[1.0], ALPHA_BAR[:-1]]))


def exact_moments(log_snr):
    """Mean and variance of x_t."""
    there = DATA.diffused(log_snr)
    return there.mean.ravel()[0], there.var.ravel()[0]


def exact_x0(row, x):
    return DATA.posterior(row.log_snr, x)[0]


def moments_at_the_end(step, schedule):
    """Mean and variance of x_1, if x_T has those of the data; of the pair (x_t, x̂_0 of the step before) on the way."""

    def after(pair, rows, last_log_snr):
        row, next_row = rows
        x_t, last_x0 = (jnp.full((1, 1, 1, 1), number) for number in pair)
        x0_hat = exact_x0(row, x_t[0])[None]
        none = PastStep(last_x0, jnp.float32(-jnp.inf))
        now = StepState(row, next_row, x_t, None, x0_hat, (PastStep(last_x0, last_log_snr), none, none), None)
        reached = step(now)
        return jnp.stack([reached.mean.ravel()[0], x0_hat.ravel()[0]]), jnp.exp(reached.log_var).ravel()[0]

    def walk(carry, rows):
        mean, covariance, last_log_snr = carry
        moved, noise = after(mean, rows, last_log_snr)
        slope = jax.jacfwd(lambda pair: after(pair, rows, last_log_snr)[0])(mean)
        covariance = slope @ covariance @ slope.T + jnp.diag(jnp.stack([noise, jnp.zeros(())]))
        return (moved, covariance, rows[0].log_snr), None

    mean, var = exact_moments(schedule.log_snr[-1])
    start = (jnp.stack([mean, jnp.zeros(())]), jnp.diag(jnp.stack([var, jnp.zeros(())])), jnp.float32(-jnp.inf))
    (mean, covariance, _), _ = jax.lax.scan(walk, start, (schedule[2:], schedule[1:-1]), reverse=True)
    return mean[0], covariance[0, 0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def errors(step, num_steps):
    """Of the mean and of the standard deviation of x_1."""
    short = schedules.respace(EVEN_IN_LOG_SNR, np.arange(1, 322, 320 // num_steps))
    (mean, var), (exact_mean, exact_var) = moments_at_the_end(step, short), exact_moments(short.log_snr[1])
    return jnp.stack([mean - exact_mean, jnp.sqrt(var) - jnp.sqrt(exact_var)])


@pytest.mark.parametrize(
    ("step", "order"),
    [
        (samplers.ddim(eta=1.0), 1),
        (samplers.dpm_solver_pp(eta=1.0), 2),
        (samplers.dpm_solver_pp(eta=0.5), 2),
        (samplers.dpm_solver_pp(), 2),
    ],
)
def test_the_standard_deviation_converges_with_the_order_of_the_sampler_and_the_mean_is_exact(step, order):
    (_, coarse), (mean, fine) = errors(step, 20), errors(step, 80)
    np.testing.assert_allclose(np.log2(coarse / fine) / 2, order, atol=0.12)
    np.testing.assert_allclose(mean, 0.0, atol=1e-6)


def test_a_step_with_noise_is_the_published_sde_update_in_float64():
    """Lu et al. (2022), SDE-DPM-Solver++(2M), in λ = log √ᾱ/σ, with h = λ_{t−1} − λ_t and r h = λ_t − λ_{t+1}."""
    schedule, x_t, x0_hat, last_x0 = EVEN_IN_LOG_SNR, 0.9, 0.4, 0.1
    half_log_snr = LOG_SNR / 2
    h = half_log_snr[99] - half_log_snr[119]
    r = (half_log_snr[119] - half_log_snr[149]) / h
    alpha, sigma = np.sqrt(ALPHA_BAR), np.sqrt(1 - ALPHA_BAR)
    x0 = (1 + 1 / (2 * r)) * x0_hat - 1 / (2 * r) * last_x0
    mean = sigma[99] / sigma[119] * np.exp(-h) * x_t + alpha[99] * (1 - np.exp(-2 * h)) * x0
    std = sigma[99] * np.sqrt(1 - np.exp(-2 * h))

    short = schedules.respace(schedule, np.array([100, 120, 150]))
    one, past = jnp.ones((1, 1, 1, 1)), PastStep(jnp.full((1, 1, 1, 1), last_x0), short.log_snr[3])
    now = StepState(short[2], short[1], x_t * one, None, x0_hat * one, (past, past, past), None)
    found = samplers.dpm_solver_pp(eta=1.0)(now)
    np.testing.assert_allclose(found.mean.ravel(), mean, rtol=2e-6)
    np.testing.assert_allclose(jnp.exp(found.log_var / 2).ravel(), std, rtol=2e-6)
