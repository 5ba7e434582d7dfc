"""The bound against closed forms and float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import gaussian, likelihood, process, reverse, schedules
from diffusion.gaussian import Gaussian


def test_the_kl_penalty_of_fixed_large_is_0_48642_bits():
    """A perfect mean costs nothing with β̃, and Σ_{t≥2} ½(log(β/β̃) + β̃/β − 1) with β: whatever the data."""
    s, shape = schedules.linear(1000), (2, 2, 3)
    x0, eps = (jax.random.uniform(jax.random.key(i), shape, minval=-1.0) for i in range(2))

    def total(variance):
        p = reverse.make("x0", variance)

        def term(row):
            return likelihood.vlb_term_bpd(p, row, x0, process.q_sample(row, x0, eps), x0)

        return jnp.sum(jax.vmap(term)(s[2:]))

    np.testing.assert_allclose(total("fixed_large"), 0.48642, atol=1e-5)
    np.testing.assert_allclose(total("fixed_small"), 0.0, atol=1e-6)


def test_prior_of_the_linear_schedule():
    s = schedules.linear(1000)
    white, black = jnp.ones((2, 2, 1)), jnp.zeros((2, 2, 1))
    # KL = ½(ᾱ_T x_0² + (1 − ᾱ_T) − log(1 − ᾱ_T) − 1), about 3e-5 bits/dim for x_0² = 1.
    alpha_bar = np.prod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(likelihood.prior_bpd(s, white), alpha_bar / 2 / np.log(2), rtol=1e-4)
    assert likelihood.prior_bpd(s, black) < 1e-8


@pytest.mark.parametrize("make", [schedules.linear, schedules.cosine])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_kl_terms_equal_float64(make, variance):
    s, rng = make(1000), np.random.default_rng(0)
    x0, eps, output = rng.uniform(-1, 1, (3, 4, 4, 3)).astype(np.float32)
    p = reverse.make("eps", variance)
    # The definition in float64, from β alone.
    beta = np.concatenate([[0.0], np.asarray(s.beta[1:], np.float64)])
    alpha_bar = np.cumprod(1 - beta)
    for t in (2, 3, 50, 500, 900, 1000 if make is schedules.linear else 980):
        row = s[t]
        x_t = process.q_sample(row, x0, eps)
        ours = likelihood.vlb_term_bpd(p, row, x0, x_t, output)
        x0_hat = (np.asarray(x_t, np.float64) - np.sqrt(1 - alpha_bar[t]) * output) / np.sqrt(alpha_bar[t])
        x0_hat = np.clip(x0_hat, -1, 1)
        beta_tilde = beta[t] * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
        sigma2 = beta[t] if variance == "fixed_large" else beta_tilde
        means = np.sqrt(alpha_bar[t - 1]) * beta[t] / (1 - alpha_bar[t]) * (x0 - x0_hat)
        kl = 0.5 * (np.log(sigma2 / beta_tilde) + beta_tilde / sigma2 - 1 + means**2 / sigma2)
        np.testing.assert_allclose(ours, kl.mean() / np.log(2), rtol=2e-4, err_msg=f"t={t}")


CASES = [(make, T) for make in (schedules.cosine, schedules.harmonic) for T in (2, 10, 100, 1000)]
CASES += [(schedules.linear, 100), (schedules.linear, 1000)]


@pytest.mark.parametrize(("make", "num_steps"), CASES)
def test_gaussian_data_has_the_closed_form_gap(make, num_steps):
    """x_0 ~ N(m, s²I): with the exact mean and variance, bound − exact NLL = KL(q(x_T) ‖ N(0, I)), for every T.

    A fixed variance v instead of the exact v* adds Σ_{t>1} ½(log(v/v*) + v*/v − 1), whatever else. All terms are
    quadratic in x_0 and ε, so the four points m ± s, ±1 give their expectation exactly.
    """
    m, std = 0.3, 0.5
    s = make(num_steps)
    x0 = jnp.asarray([m - std, m - std, m + std, m + std]).reshape(2, 2, 1)
    eps = jnp.asarray([-1.0, 1.0, -1.0, 1.0]).reshape(2, 2, 1)

    def nats(row):
        """One term with the exact reverse variance, β̃ and β; and the exact variance."""
        x_t = process.q_sample(row, x0, eps)
        signal, noise = row.sqrt_alpha_bar**2 * std**2, row.sqrt_one_minus_alpha_bar**2
        x0_mean = m + row.sqrt_alpha_bar * std**2 / (signal + noise) * (x_t - row.sqrt_alpha_bar * m)
        exact = jnp.log(row.beta_tilde + row.posterior_x0**2 * std**2 * noise / (signal + noise))
        log_vars = jnp.stack([exact, row.log_beta_tilde, row.log_beta])

        def one(log_var):
            output = jnp.concatenate([x0_mean, jnp.full_like(x0, log_var)], axis=-1)
            p_prev, _ = reverse.make("x0", "learned")(row, x_t, output, clip_x0=False)
            kl = gaussian.kl(process.q_posterior(row, x0, x_t), p_prev)
            return jnp.where(row.t == 1, -gaussian.log_prob(p_prev, x0), kl).mean()  # a continuous decoder

        return jax.vmap(one)(log_vars), log_vars

    terms, log_vars = (np.asarray(a, np.float64) for a in jax.jit(jax.vmap(nats))(s[1:]))
    standard_normal = Gaussian(jnp.zeros_like(x0), jnp.zeros_like(x0))
    prior = float(gaussian.kl(process.q_marginal(s[num_steps], x0), standard_normal).mean())
    nll = 0.5 * (np.log(2 * np.pi * std**2) + 1)
    last = s[num_steps]
    end_mean, end_var = float(last.sqrt_alpha_bar) * m, float(last.alpha_bar) * std**2 + 1 - float(last.alpha_bar)
    closed_form = 0.5 * (end_mean**2 + end_var - 1 - np.log(end_var))
    # float32 terms, up to 1,000 of them: their roundings add up to some 1e-6.
    np.testing.assert_allclose(terms[:, 0].sum() + prior - nll, closed_form, atol=2e-5)
    for fixed in (1, 2):
        log_ratio = (log_vars[:, fixed] - log_vars[:, 0])[1:]
        penalty = 0.5 * np.sum(log_ratio + np.expm1(-log_ratio))
        assert penalty > 5e-4  # so that the next line says something
        np.testing.assert_allclose((terms[1:, fixed] - terms[1:, 0]).sum(), penalty, rtol=1e-3, atol=2e-5)


def test_every_image_and_term_is_scored_alone():
    """A batch's terms are the same as each image's own, whatever it is batched with, and match single terms."""
    s, p = schedules.cosine(6), reverse.make("eps", "fixed_small")
    x0 = jnp.round(jax.random.uniform(jax.random.key(0), (3, 4, 4, 1), minval=-1.0) * 8) / 8
    keys = jax.random.split(jax.random.key(5), 3)

    def denoise(x_t, network_t):
        return 0.5 * x_t + 0.01 * network_t[:, None, None, None]

    terms = jax.jit(partial(likelihood.vlb_terms_bpd, denoise, p, s, num_levels=17))
    together, x0_mse = terms(x0, keys)
    alone, _ = terms(x0[1:2], keys[1:2])
    assert together.shape == (3, 6)
    np.testing.assert_allclose(together[1:2], alone, rtol=1e-5)
    eps = jax.random.normal(jax.random.fold_in(keys[1], 4), x0.shape[1:])
    x_t = process.q_sample(s[4], x0[1], eps)
    term = likelihood.vlb_term_bpd(p, s[4], x0[1], x_t, 0.5 * x_t + 0.01 * 3.0, num_levels=17)
    np.testing.assert_allclose(together[1, 3], term, rtol=1e-5)
    x0_hat = jnp.clip((x_t - s.sqrt_one_minus_alpha_bar[4] * (0.5 * x_t + 0.01 * 3.0)) / s.sqrt_alpha_bar[4], -1, 1)
    np.testing.assert_allclose(x0_mse[1, 3], np.mean((x0[1] - x0_hat) ** 2), rtol=1e-5)
    # Pairs of images and t in any order are entries of the same table.
    image, t = np.array([2, 0, 1, 1, 0]), np.array([6, 1, 4, 1, 3])
    measure = likelihood.term_and_x0_mse(p, num_levels=17)
    pairs = likelihood.at_one_t(denoise, s[t], x0[image], keys[image], measure)
    np.testing.assert_allclose(pairs[0], together[image, t - 1], rtol=1e-5)
    np.testing.assert_allclose(pairs[1], x0_mse[image, t - 1], rtol=1e-5)


def test_gradients_are_finite_at_both_ends():
    for variance in ("fixed_small", "fixed_large", "learned", "learned_range"):
        p, s = reverse.make("eps", variance), schedules.cosine(100)
        x0 = jnp.sign(jax.random.normal(jax.random.key(0), (4, 4, 1)))
        output = 5 * jax.random.normal(jax.random.key(1), (4, 4, p.output_channels(1)))

        def loss(out, row, p=p, x0=x0):
            return likelihood.vlb_term_bpd(p, row, x0, x0 + 0.1, out, clip_x0=False)

        gradient = jax.jit(jax.grad(loss))
        for t in (1, 2, 100):
            assert np.isfinite(gradient(output, s[t])).all(), (variance, t)


def test_a_measure_may_be_any_tree_and_keeps_its_place():
    """Leaves [B, T], entry t − 1 is that of t; the ε of an image and t are the same for every measure."""
    s = schedules.cosine(4)
    x0, keys = jnp.zeros((2, 2, 2, 1)), jax.random.split(jax.random.key(5), 2)

    def measure(row, x0, x_t, eps, output):
        return {"t": row.t, "eps": eps[0, 0, 0]}

    found = likelihood.over_all_t(lambda x_t, network_t: x_t, s, x0, keys, measure)
    np.testing.assert_array_equal(found["t"], [[1, 2, 3, 4]] * 2)
    drawn = [[jax.random.normal(jax.random.fold_in(key, t), (2, 2, 1))[0, 0, 0] for t in range(1, 5)] for key in keys]
    np.testing.assert_array_equal(found["eps"], drawn)
