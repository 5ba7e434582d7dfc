"""The optimal variance against closed forms, and the accounting against the bound itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import gaussian, likelihood, process, reverse, samplers, schedules, variances

M, S2 = 0.3, 0.25  # x_0 ~ N(m, s²)
SHORT = schedules.evenly_spaced(schedules.linear(1000), 6)


def x0_variance(s):
    """Var(x_0 | x_t) = s²(1 − ᾱ)/(ᾱ s² + 1 − ᾱ), for every t of a schedule."""
    alpha_bar = np.asarray(s.alpha_bar, np.float64)
    noise = np.asarray(s.sqrt_one_minus_alpha_bar, np.float64) ** 2
    return S2 * noise / (alpha_bar * S2 + noise)


def with_exact_variance(s):
    return dataclasses.replace(s, x0_variance=jnp.asarray(x0_variance(s), jnp.float32))


def exact(s, p, m=M):
    """The perfect network for Gaussian data, whatever it predicts."""

    def one(x_t, network_t):
        row = s[jnp.searchsorted(s.network_t, network_t)]
        signal, noise = row.sqrt_alpha_bar**2 * S2, row.sqrt_one_minus_alpha_bar**2
        x0_mean = m + row.sqrt_alpha_bar * S2 / (signal + noise) * (x_t - row.sqrt_alpha_bar * m)
        eps_mean = (x_t - row.sqrt_alpha_bar * x0_mean) / row.sqrt_one_minus_alpha_bar
        return p.target(row, x0_mean, x_t, eps_mean)

    return jax.vmap(one)


def gaussian_images(n, shape=(8, 8, 1)):
    keys = jax.random.split(jax.random.key(0), n)
    return M + S2**0.5 * jax.random.normal(jax.random.key(1), (n, *shape)), keys


@pytest.mark.parametrize(
    ("prediction", "make"),
    [("eps", schedules.linear), ("x0", schedules.cosine), ("v", schedules.harmonic), ("mean", schedules.linear)],
)
def test_the_estimate_covers_the_closed_form(prediction, make):
    s, p = make(40), reverse.make(prediction, "fixed_small")
    x0, keys = gaussian_images(400)
    terms = likelihood.over_all_t(exact(s, p), s, x0, keys, variances.x0_terms(p, clip_x0=False))
    for name, per_image in terms._asdict().items():
        estimate = variances.X0Variance.over_images(per_image)
        assert np.all(np.abs(estimate.mean - x0_variance(s)) < 4 * estimate.stderr + 1e-6), name
        # So the line above says something: σ*² is known to 5 %, with the ε form's noise of 1/√ᾱ_t damped by c².
        added = np.asarray(s.posterior_x0) ** 2 * estimate.stderr
        optimal = np.asarray(s.beta_tilde) + np.asarray(s.posterior_x0) ** 2 * x0_variance(s)
        assert np.all(added[1:-1] < 0.05 * optimal[1:-1]), name


def test_sigma_is_the_closed_form_in_every_respacing():
    """The table of 1000 steps, respaced, is the exact reverse variance of each shorter process."""
    full = with_exact_variance(schedules.linear(1000))
    for s in (full, schedules.evenly_spaced(full, 50), schedules.respace(full, [1, 10, 900])):
        alpha_bar = np.asarray(s.alpha_bar, np.float64)
        noise = np.asarray(s.sqrt_one_minus_alpha_bar, np.float64) ** 2
        beta = 1 - alpha_bar[1:] / alpha_bar[:-1]
        # x_{t−1} and x_t are jointly Gaussian, with Cov = √(1 − β_t) Var(x_{t−1}).
        marginal = alpha_bar * S2 + noise
        conditional = marginal[:-1] - (1 - beta) * marginal[:-1] ** 2 / marginal[1:]
        p = reverse.make("eps", "optimal")
        x = jnp.zeros((1, 1, 1))
        log_var = jax.jit(jax.vmap(lambda row, x=x, p=p: p(row, x, x).p_prev.log_var[0, 0, 0]))(s[2:])
        np.testing.assert_allclose(np.exp(log_var), conditional[1:], rtol=2e-2 if s is full else 2e-3)
        assert p(s[1], x, x)[0].log_var[0, 0, 0] == s.log_beta_tilde[1]  # the decoder's width


def test_a_schedule_without_the_estimate_is_refused_by_name():
    x = jnp.zeros((1, 1, 1))
    with pytest.raises(ValueError, match="variance='optimal' needs a schedule whose x0_variance was estimated"):
        reverse.make("eps", "optimal")(schedules.cosine(10)[3], x, x)
    with pytest.raises(ValueError, match="at least 2 images, not 1"):
        variances.X0Variance.over_images(np.zeros((1, 5)))


def test_clipping_does_not_reach_the_analytic_estimate():
    s, p = schedules.cosine(5), reverse.make("eps", "fixed_small")
    x0, keys = gaussian_images(3)
    clipped, free = (
        likelihood.over_all_t(exact(s, p), s, x0, keys, variances.x0_terms(p, clip_x0)) for clip_x0 in (True, False)
    )
    np.testing.assert_array_equal(clipped.analytic, free.analytic)
    assert np.any(clipped.error != free.error)


def account(s, p, x0, keys, denoise, candidates, clip_x0=False):
    measure = variances.split_terms_bpd(p, candidates, num_levels=17, clip_x0=clip_x0)
    return jax.jit(lambda: likelihood.over_all_t(denoise, s, x0, keys, measure))()


SCALAR = {name: reverse.VARIANCES[name] for name in ("fixed_small", "fixed_large", "optimal")} | {
    f"{f:g}": variances.interpolated(f) for f in (0.25, 0.5, 0.75)
}


def test_nothing_costs_less_than_the_optimal_variance():
    """E KL = ½(log(σ²/β̃) + σ*²/σ² − 1), whose minimum is σ²= σ*², for Gaussian data with the exact mean."""
    s, p = with_exact_variance(SHORT), reverse.make("eps", "fixed_small")
    x0, keys = gaussian_images(500)
    splits = account(s, p, x0, keys, exact(s, p), SCALAR)
    kl = {name: np.asarray(split.mismatch + split.mean_error, np.float64)[:, 1:] for name, split in splits.items()}
    beta_tilde, beta = (np.asarray(table, np.float64)[2:] for table in (s.beta_tilde, s.beta))
    best = beta_tilde + np.asarray(s.posterior_x0)[2:] ** 2 * x0_variance(s)[2:]
    for name, fraction in {"fixed_small": 0, "0.25": 0.25, "0.5": 0.5, "0.75": 0.75, "fixed_large": 1}.items():
        sigma2 = beta**fraction * beta_tilde ** (1 - fraction)
        expected = 0.5 * (np.log(sigma2 / beta_tilde) + best / sigma2 - 1) / np.log(2)
        stderr = kl[name].std(axis=0, ddof=1) / len(x0) ** 0.5
        assert np.all(np.abs(kl[name].mean(axis=0) - expected) < 4 * stderr + 1e-5), name
        excess = (kl[name] - kl["optimal"]).sum(axis=1)
        assert excess.mean() > 5 * excess.std(ddof=1) / len(x0) ** 0.5 > 0, name
        np.testing.assert_allclose(
            excess.mean(),
            0.5 * np.sum(best / sigma2 - np.log(best / sigma2) - 1) / np.log(2),
            atol=4 * excess.std(ddof=1) / len(x0) ** 0.5,
        )


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_the_split_adds_up_to_the_bound(variance):
    """Every image, every t, the decoder too, with the bound's own noise and clipping."""
    s, p = schedules.cosine(12), reverse.make("v", variance)
    x0 = jnp.round(jax.random.uniform(jax.random.key(0), (3, 4, 4, 1), minval=-1.0) * 8) / 8
    keys = jax.random.split(jax.random.key(5), 3)

    def denoise(x_t, network_t):
        halves = [0.3 * x_t, -0.5 + 0.2 * jnp.sin(9 * x_t)]
        return jnp.concatenate(halves[: 2 if p.learns_variance else 1], axis=-1)

    split = account(s, p, x0, keys, denoise, {"own": reverse.VARIANCES[variance]}, clip_x0=True)["own"]
    terms, _ = likelihood.vlb_terms_bpd(denoise, p, s, x0, keys, num_levels=17)
    np.testing.assert_allclose(sum(split), terms, rtol=2e-5, atol=1e-6)
    assert (
        np.all(split.decoder[:, 1:] == 0) and np.all(split.mismatch[:, 0] == 0) and np.all(split.mean_error[:, 0] == 0)
    )
    assert np.all(np.asarray(split.mean_error[:, 1:]) > 0)


def test_the_mismatch_of_fixed_large_is_0_48642_bits():
    """On the linear 1000-step schedule, for any data and any network; β̃ has none."""
    s, p = schedules.linear(1000), reverse.make("eps", "fixed_small")
    x0, keys = gaussian_images(2, (2, 2, 1))
    candidates = {name: reverse.VARIANCES[name] for name in ("fixed_small", "fixed_large")}
    splits = account(s, p, x0, keys, lambda x_t, network_t: jnp.sin(3 * x_t), candidates)
    np.testing.assert_allclose(splits["fixed_large"].mismatch.sum(axis=1), 0.48642, atol=1e-5)
    np.testing.assert_array_equal(splits["fixed_small"].mismatch, 0.0)


def test_only_the_optimal_variance_samples_the_right_variance_in_few_steps():
    """Six steps with the exact reverse Gaussians end at Var(E[x_0 | x_1]), since the last step adds no noise."""
    s, step = with_exact_variance(SHORT), samplers.ancestral()
    keys = jax.random.split(jax.random.key(3), 2)

    def end_variance(variance):
        p = reverse.make("eps", variance)
        draw = jax.jit(lambda: samplers.sample(step, exact(s, p, m=0.0), p, s, keys, (128, 128, 1), clip_x0=False)[0])
        return float(draw().var())

    right = S2 - x0_variance(s)[1]
    stderr = right * (2 / (2 * 128 * 128)) ** 0.5
    assert abs(end_variance("optimal") - right) < 4 * stderr
    assert end_variance("fixed_small") < right - 10 * stderr
    assert end_variance("fixed_large") > right + 10 * stderr


# --- NPR-DDPM: Bao et al. (2022, "Estimating the optimal covariance with imperfect mean")


@pytest.mark.parametrize("t", [2, 3, 4])
def test_npr_is_the_variance_that_costs_least_for_a_wrong_mean(t):
    """E KL(q(x_{t−1} | x_t, x_0) ‖ p) over x_0 given x_t is least at g = E[(ε − ε̂)² | x_t], whatever x̂_0 is."""
    row, p = SHORT[t], reverse.make("x0", "npr")
    x0 = jnp.asarray(np.random.default_rng(t).normal(0.2, 0.3, (500, 1, 1, 1)), jnp.float32)
    x_t, wrong = jnp.full((1, 1, 1), 0.1), jnp.full((1, 1, 1), -0.4)
    g = jnp.exp(row.log_snr) * jnp.mean((x0 - wrong[None]) ** 2)

    @jax.jit
    def cost(g):
        p_prev = p(row, x_t, jnp.concatenate([wrong, jnp.full((1, 1, 1), g)], -1)).p_prev
        return jax.vmap(lambda x0: gaussian.kl(process.q_posterior(row, x0, x_t), p_prev))(x0).mean()

    costs = [float(cost(factor * g)) for factor in (0.8, 1.0, 1.25)]
    assert costs[1] < min(costs[0], costs[2]) - 1e-6


def test_npr_of_a_network_of_zeros_is_a_variance_where_nothing_of_x0_is_left():
    """ᾱ_T = 0: 1/SNR is ∞."""
    row, p, x = schedules.rectified_flow(10)[10], reverse.make("v", "npr"), jnp.zeros((1, 1, 1))
    log_var = p(row, x, jnp.zeros((1, 1, 2))).p_prev.log_var
    np.testing.assert_array_equal(log_var, jnp.full_like(x, row.log_beta_tilde))
    assert np.isnan(p(row, x, jnp.full((1, 1, 2), jnp.nan)).p_prev.log_var).all()  # an output of NaN stays visible


def test_npr_with_the_exact_error_is_the_exact_variance_and_keeps_the_decoder_s_width():
    p, x = reverse.make("eps", "npr"), jnp.zeros((1, 1, 1))
    exact = x0_variance(SHORT)
    for t in range(1, 7):
        g = jnp.full_like(x, np.exp(np.float64(SHORT.log_snr[t])) * exact[t])
        found = p(SHORT[t], x, jnp.concatenate([x, g], -1)).p_prev.log_var[0, 0, 0]
        optimal = reverse.make("eps", "optimal")(with_exact_variance(SHORT)[t], x, x).p_prev.log_var[0, 0, 0]
        np.testing.assert_allclose(found, optimal, rtol=1e-5)
    # No x_0 in [-1, 1] has a variance outside of [0, 1], whatever a network says.
    for g, x0_var in ((-5.0, 0.0), (1e9, 1.0)):
        found = p(SHORT[3], x, jnp.concatenate([x, jnp.full_like(x, g)], -1)).p_prev.log_var[0, 0, 0]
        row = SHORT[3]
        np.testing.assert_allclose(jnp.exp(found), row.beta_tilde + row.posterior_x0**2 * x0_var, rtol=1e-5)
