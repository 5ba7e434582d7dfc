"""Tables against closed forms in float64, and the laws of respacing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from diffusion import continuous_time, process, reverse, schedules
from diffusion.exact import ode

ALL = [make(200) for make in schedules.SCHEDULES.values()]


def alpha_bars(betas):
    """ᾱ_0…ᾱ_T, multiplied up in extended precision."""
    return np.concatenate([[1.0], np.cumprod(1 - np.asarray(betas, np.longdouble))])


def test_linear_is_ho_et_al():
    betas = np.linspace(1e-4, 0.02, 1000)
    s = schedules.linear(1000)
    exact = alpha_bars(betas)
    np.testing.assert_allclose(s.beta[1:], betas, rtol=1e-7)
    np.testing.assert_allclose(s.alpha_bar, exact, rtol=1e-6)
    # A float32 cumulative product would have an error of 1.7e-4 here.
    np.testing.assert_allclose(s.sqrt_one_minus_alpha_bar**2, 1 - exact, rtol=1e-6)
    np.testing.assert_allclose(s.beta_tilde[1:], betas * (1 - exact[:-1]) / (1 - exact[1:]), rtol=1e-6)


def test_endpoints_scale_with_the_number_of_steps():
    for make in (schedules.linear, schedules.quadratic, schedules.constant, schedules.warmup):
        coarse, fine = make(250), make(1000)
        np.testing.assert_allclose(coarse.beta.sum(), fine.beta.sum(), rtol=2e-3)  # a Riemann sum
        np.testing.assert_allclose(coarse.beta[-1], 4 * fine.beta[-1], rtol=1e-6)


def test_cosine_follows_its_formula_up_to_the_clip():
    s = schedules.cosine(1000)
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(s.alpha_bar[:990], (f / f[0])[:990], rtol=2e-6)
    assert np.isclose(s.beta[-1], 0.999)


def test_warmup_and_harmonic():
    betas = np.asarray(schedules.warmup(1000, fraction=0.1).beta)
    np.testing.assert_allclose(betas[1:101], np.linspace(1e-4, 0.02, 100), rtol=1e-6)
    np.testing.assert_allclose(betas[101:], 0.02, rtol=1e-6)
    s = schedules.harmonic(10)
    np.testing.assert_allclose(s.alpha_bar, 1 - np.arange(11) / 10, atol=1e-7)  # ᾱ falls linearly to 0


@pytest.mark.parametrize("s", ALL)
def test_clean_data_is_entry_zero(s):
    assert s.num_steps == 200 and s.beta.shape == (201,)
    row = s[0]
    assert row.alpha_bar == 1 and row.beta == 0 and row.posterior_x0 == 1 and row.posterior_x_t == 0
    np.testing.assert_array_equal(s.network_t[1:], np.arange(200))
    np.testing.assert_array_equal(s.t, np.arange(201))
    np.testing.assert_array_equal(s.alpha_bar_prev[1:], s.alpha_bar[:-1])
    for name, table in vars(s).items():
        assert table is None or np.isfinite(table[1:-1]).all(), name
    assert s.log_beta_tilde[1] == s.log_beta_tilde[2] == s.log_beta_large[1]


@pytest.mark.parametrize("s", ALL)
def test_respacing_keeps_the_marginals(s):
    keep = [1, 7, 40, 199, 200]
    short = schedules.respace(s, keep)
    rows = s[jnp.asarray([0, *keep])]
    for name in ("alpha_bar", "sqrt_one_minus_alpha_bar", "network_t"):
        np.testing.assert_allclose(getattr(short, name), getattr(rows, name), rtol=1e-6, atol=1e-30)
    # The β are rescaled too, which a sampler that only skips rows would miss.
    rescaled = -np.expm1(np.asarray(s.log_alpha, np.float64)[8:41].sum())
    np.testing.assert_allclose(short.beta[3], rescaled, rtol=1e-5)


def test_respacing_to_every_step_changes_nothing():
    s = dataclasses.replace(schedules.cosine(50), x0_variance=jnp.linspace(0.0, 1.0, 51))
    short = schedules.respace(s, np.arange(1, 51))
    assert jax.tree.structure(short) == jax.tree.structure(s)
    tables = {name: table for name, table in vars(short).items() if table is not None}
    for name, table in tables.items():
        np.testing.assert_allclose(table, getattr(s, name), rtol=2e-6, err_msg=name)


def test_every_step_of_a_trailing_respacing_is_the_posterior_of_its_marginals():
    """t = 50, 100, … 1000: the first and the last step too, from ᾱ alone in float64.

    Another program subtracts 50 from the last t and gets t = 0 by another rule: its step there adds noise.
    """
    full, keep = schedules.linear(1000), np.arange(50, 1001, 50)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[keep - 1]
    before = np.concatenate([[1.0], alpha_bar[:-1]])
    # x_prev and x_t given x_0 are jointly Gaussian, with covariance √(ᾱ_t/ᾱ_prev) Var(x_prev).
    slope = np.sqrt(alpha_bar / before) * (1 - before) / (1 - alpha_bar)
    of_x0 = np.sqrt(before) - slope * np.sqrt(alpha_bar)
    variance = (1 - before) - slope * np.sqrt(alpha_bar / before) * (1 - before)
    short = schedules.respace(full, keep)
    np.testing.assert_allclose(short.posterior_x_t[1:], slope, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(short.posterior_x0[1:], of_x0, rtol=1e-5)
    np.testing.assert_allclose(short.beta_tilde[1:], variance, rtol=1e-5, atol=1e-12)
    assert short.beta_tilde[1] == 0 and short.posterior_x0[1] == 1  # the last step is x̂_0 and adds no noise


def test_a_first_step_may_shrink_the_image():
    gamma, scale = np.linspace(-9, 4, 30), 0.75
    s = schedules.from_gamma(gamma, np.arange(30), scale)
    signal, var = scale * np.sqrt(expit(-gamma)), expit(gamma)
    np.testing.assert_allclose(s.sqrt_alpha_bar[1:], signal, rtol=1e-6)
    np.testing.assert_allclose(s.sqrt_one_minus_alpha_bar[1:], np.sqrt(var), rtol=1e-6)
    np.testing.assert_allclose(np.exp(np.float64(s.log_snr[1:])), signal**2 / var, rtol=1e-5)
    # Its steps compose to these marginals, and the posterior is theirs by Bayes' rule.
    alpha, beta = (np.exp(np.float64(table)) for table in (s.log_alpha, s.log_beta))
    np.testing.assert_allclose(np.sqrt(np.cumprod(alpha[1:])), signal, rtol=1e-5)
    np.testing.assert_allclose(alpha[2:] * var[:-1] + beta[2:], var[1:], rtol=1e-5)
    posterior_var = 1 / (1 / var[:-1] + alpha[2:] / beta[2:])
    np.testing.assert_allclose(s.beta_tilde[2:], posterior_var, rtol=1e-5)
    np.testing.assert_allclose(s.posterior_x0[2:], posterior_var * signal[:-1] / var[:-1], rtol=1e-5)
    np.testing.assert_allclose(s.posterior_x_t[2:], posterior_var * np.sqrt(alpha[2:]) / beta[2:], rtol=1e-5)
    # Fewer latents and more of them are on the same curve, as is every instant.
    fewer, same = schedules.respace(s, [1, 4, 30]), continuous_time.resampled(s, 30)
    instants = continuous_time.at(s, jnp.float32([1, 4, 30]))
    for name in ("sqrt_alpha_bar", "sqrt_one_minus_alpha_bar", "log_snr"):
        table = np.asarray(getattr(s, name))[[1, 4, 30]]
        for found in (getattr(fewer, name)[1:], getattr(same, name)[np.array([1, 4, 30])], getattr(instants, name)):
            np.testing.assert_allclose(found, table, rtol=1e-5, atol=1e-5, err_msg=name)
    assert float(fewer.x0_scale[0]) == scale
    with pytest.raises(ValueError, match="a schedule with an x0_scale does not preserve the variance"):
        ode.eps_predictor(jnp.add, reverse.make("eps", "fixed_small"), s)


def test_evenly_spaced_ends_at_the_prior():
    s = schedules.linear(1000)
    np.testing.assert_array_equal(schedules.evenly_spaced(s, 5).network_t[1:], [0, 250, 499, 749, 999])
    np.testing.assert_array_equal(schedules.evenly_spaced(s, 1).network_t[1:], [999])


def test_rows_index_like_tables_and_work_inside_jit():
    s = schedules.cosine(10)
    batch = jax.jit(lambda s, t: s[t])(s, jnp.asarray([3, 1]))
    assert batch.beta.shape == (2,) and batch.beta[0] == s[3].beta
    with pytest.raises(IndexError, match="t=11"):
        s[11]
    with pytest.raises(IndexError, match="t=-1"):
        s[-1]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: schedules.from_betas([0.1, 0.0]), r"β_2 = 0 "),
        (lambda: schedules.from_betas([0.1, 1.1]), "must lie in"),
        (lambda: schedules.from_betas([float("nan")]), "β_1 = nan"),
        (lambda: schedules.from_betas([]), "T ≥ 1"),
        (lambda: schedules.linear(0), "not 0"),
        (lambda: schedules.cosine(-3), "not -3"),
        (lambda: schedules.linear(10), r"β_5 = 0.\d+|β must lie"),  # endpoints scaled by 100 leave (0, 1]
        (lambda: schedules.warmup(10, fraction=1.5), "1.5"),
        (lambda: schedules.cosine(10, offset=-0.1), "at least 0, not -0.1"),
        (lambda: schedules.respace(schedules.cosine(10), [3, 3]), "increase strictly"),
        (lambda: schedules.respace(schedules.cosine(10), [0, 3]), "1…10"),
        (lambda: schedules.respace(schedules.cosine(10), [3, 11]), "1…10"),
        (lambda: schedules.respace(schedules.cosine(10), []), "list of integers"),
        (lambda: schedules.evenly_spaced(schedules.cosine(10), 11), "cannot keep 11 of 10"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)


def test_linear_gamma_in_float64():
    schedule = schedules.linear_gamma(1000)
    gamma = np.linspace(-13.3, 5.0, 1000)
    np.testing.assert_allclose(-schedule.log_snr[1:], gamma, rtol=1e-6)
    np.testing.assert_allclose(schedule.sqrt_one_minus_alpha_bar[1:] ** 2, expit(gamma), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(process.gamma_step)(schedule[2:]), 18.3 / 999, rtol=1e-5)
    with pytest.raises(ValueError, match="gamma_min=6.0 must be below gamma_max=5.0"):
        schedules.linear_gamma(10, gamma_min=6.0)
    with pytest.raises(ValueError, match="schedule.num_steps=1 must be at least 2"):
        schedules.linear_gamma(1)
