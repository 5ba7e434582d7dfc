"""The linear path (1 − s) x_0 + s ε of rectified flow: its bound equals that of the diffusion with the same log SNR."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from diffusion import likelihood, process, reverse, schedules

NUM_STEPS, LEVELS = 20, 17
RNG = np.random.default_rng(0)
X0 = RNG.integers(0, LEVELS, (4, 4, 1)) / 8 - 1.0
EPS, U = RNG.normal(size=(2, NUM_STEPS + 1, 4, 4, 1))


def path_terms_bpd(s):
    """The bound's terms of t = 1…T in float64 for z_s = (1 − s) x_0 + s ε and x̂_0 = z_s − s u, with this path alone.

    The posterior is that of Kingma et al. (2021, VDM), appendix A, for any α_s and σ_s; the decoder is Bayes' rule.
    """
    alpha, sigma = 1 - s, s
    z = alpha[:, None, None, None] * X0 + sigma[:, None, None, None] * EPS
    levels = np.linspace(-1, 1, LEVELS)
    log_density = -0.5 * ((z[1][..., None] - alpha[1] * levels) / sigma[1]) ** 2
    own = -0.5 * ((z[1] - alpha[1] * X0) / sigma[1]) ** 2
    terms = [np.mean(logsumexp(log_density, axis=-1) - own)]
    for t in range(2, NUM_STEPS + 1):
        ratio = alpha[t] / alpha[t - 1]
        added = sigma[t] ** 2 - ratio**2 * sigma[t - 1] ** 2
        variance = added * sigma[t - 1] ** 2 / sigma[t] ** 2
        of_x0 = alpha[t - 1] * added / sigma[t] ** 2
        terms.append(np.mean((of_x0 * (X0 - (z[t] - sigma[t] * U[t]))) ** 2) / (2 * variance))
    return np.array(terms) / math.log(2)


def test_the_linear_path_has_the_bound_of_the_schedule_with_its_log_snr():
    schedule, p = schedules.rectified_flow(NUM_STEPS), reverse.make("velocity", "fixed_small", "bayes")

    def term(row, eps, u):
        x_t = process.q_sample(row, X0.astype(np.float32), eps)
        return likelihood.vlb_term_bpd(p, row, X0.astype(np.float32), x_t, u, LEVELS, clip_x0=False)

    ours = jax.vmap(term)(schedule[1:], jnp.float32(EPS[1:]), jnp.float32(U[1:]))
    np.testing.assert_allclose(ours, path_terms_bpd(np.arange(NUM_STEPS + 1) / NUM_STEPS), rtol=2e-5)
    assert likelihood.prior_bpd(schedule, jnp.float32(X0)) == 0  # at s = 1 nothing of x_0 is left


def test_its_log_snr_is_that_of_the_path_and_may_end_before_the_noise():
    s = np.arange(1, 1000) / 1000
    found = schedules.rectified_flow(1000).log_snr[1:-1]
    np.testing.assert_allclose(found, 2 * np.log((1 - s) / s), rtol=1e-5, atol=1e-6)
    shorter = schedules.rectified_flow(10, last=0.5)
    np.testing.assert_allclose(shorter.alpha_bar[10], 0.5, rtol=1e-6)
    with pytest.raises(ValueError, match=r"rectified_flow: last=1.5 must be in \(0, 1\] \(schedule.name\)"):
        schedules.rectified_flow(10, last=1.5)


@pytest.mark.parametrize("schedule", [schedules.rectified_flow(50), schedules.cosine(50)])
def test_the_velocity_is_the_slope_of_the_path(schedule):
    """(z_s − z_r)/(s − r) between any two points of the path through x_0 and ε, which every schedule runs along."""
    a, b = (np.asarray(table, np.float64)[1:] for table in (schedule.sqrt_alpha_bar, schedule.sqrt_one_minus_alpha_bar))
    x_t = a[:, None, None, None] * X0 + b[:, None, None, None] * EPS[0]
    z, s = x_t / (a + b)[:, None, None, None], b / (a + b)
    slope = (z[-1] - z[0]) / (s[-1] - s[0])
    found = reverse.make("velocity", "fixed_small").target(schedule[7], X0, x_t[6], EPS[0])
    np.testing.assert_allclose(found, slope, rtol=1e-6)
