"""Exact data: their moments against quadrature, and the bound against the known likelihood."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import likelihood, reverse, schedules
from diffusion.exact import oracles

SHAPE = (1, 1, 2)
GAUSSIAN = oracles.normal(jnp.asarray([[[0.3, -1.0]]]), jnp.asarray([[[0.2, 1.3]]]))
LINE = oracles.Mixture(
    jnp.asarray([0.2, 0.5, 0.3]), jnp.asarray([-1.5, 0.0, 1.0]), jnp.asarray([0.4, 0.2, 0.1]) ** 2
)  # shape []: one number


def test_moments_and_score_equal_quadrature():
    """p(x_t), its derivative and the moments of x_0 given x_t from ∫ p(x_0) q(x_t | x_0) dx_0 in float64."""
    x0 = np.linspace(-4, 4, 20001)
    density = sum(
        w * np.exp(-((x0 - m) ** 2) / (2 * v)) / np.sqrt(2 * np.pi * v)
        for w, m, v in zip(*(np.asarray(a, np.float64) for a in (LINE.weight, LINE.mean, LINE.var)), strict=True)
    )
    for log_snr in (-3.0, 0.0, 2.0):
        alpha_bar = 1 / (1 + np.exp(-log_snr))
        for x_t in (-1.2, 0.1, 0.8):
            kernel = np.exp(-((x_t - np.sqrt(alpha_bar) * x0) ** 2) / (2 * (1 - alpha_bar)))
            joint = density * kernel / np.sqrt(2 * np.pi * (1 - alpha_bar))
            total = np.trapezoid(joint, x0)
            mean = np.trapezoid(x0 * joint, x0) / total
            var = np.trapezoid((x0 - mean) ** 2 * joint, x0) / total
            diffused = LINE.diffused(jnp.float32(log_snr))
            np.testing.assert_allclose(diffused.log_prob(jnp.float32(x_t)), np.log(total), atol=2e-6)
            np.testing.assert_allclose(LINE.posterior(jnp.float32(log_snr), jnp.float32(x_t)), (mean, var), rtol=1e-4)
            # Tweedie: √ᾱ E[x_0 | x_t] = x_t + (1 − ᾱ) ∇ log p(x_t).
            score = (np.sqrt(alpha_bar) * mean - x_t) / (1 - alpha_bar)
            np.testing.assert_allclose(diffused.score(jnp.float32(x_t)), score, rtol=1e-4, atol=1e-5)
            eps = LINE.eps(jnp.float32(x_t), jnp.float32(log_snr))
            np.testing.assert_allclose(eps, -np.sqrt(1 - alpha_bar) * score, rtol=1e-4, atol=1e-5)


def test_no_product_is_rounded_on_accelerators():
    """By default they would keep 8 or 11 bits of every mean of a component, so nothing here would be exact."""
    scalar = jnp.float32(0.5)
    for of in (LINE.score, lambda x: LINE.posterior(scalar, x), lambda x: LINE.eps(x, scalar)):
        text = str(jax.make_jaxpr(of)(scalar))
        assert text.count("dot_general[") == text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") > 0


def test_score_is_the_gradient_in_any_dimension():
    data = oracles.Mixture(
        jnp.asarray([0.25, 0.75]), jax.random.normal(jax.random.key(0), (2, *SHAPE)), jnp.full((2, *SHAPE), 0.5)
    )
    x = jax.random.normal(jax.random.key(1), SHAPE)
    np.testing.assert_allclose(data.score(x), jax.grad(data.log_prob)(x), rtol=1e-5, atol=1e-6)


def test_samples_have_the_mixture_s_moments():
    draws = np.asarray(jax.vmap(LINE.sample)(jax.random.split(jax.random.key(0), 40_000)))
    weight, mean, var = (np.asarray(leaf) for leaf in (LINE.weight, LINE.mean, LINE.var))
    m = (weight * mean).sum()
    v = (weight * (var + mean**2)).sum() - m**2
    np.testing.assert_allclose((draws.mean(), draws.var()), (m, v), atol=0.02)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "mean"])
def test_every_prediction_gives_the_same_reverse_process(prediction):
    s = schedules.cosine(20)
    x_t, t = jax.random.normal(jax.random.key(0), (4, *SHAPE)), np.array([1, 3, 11, 20])

    def of(name):
        p = reverse.make(name, "learned")
        output = GAUSSIAN.denoiser(p, s)(x_t, s.network_t[t])
        return jax.vmap(lambda row, x, out: p(row, x, out, False).p_prev)(s[t], x_t, output)

    ours, x0s = of(prediction), of("x0")
    np.testing.assert_allclose(ours.mean, x0s.mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours.log_var, x0s.log_var, rtol=1e-6)


def bound_gap_nats(variance, schedule, num_images, data=GAUSSIAN):
    """bound − (−log p(x_0)) of draws of the data, in nats, from one ε per image and t, and the mean's error."""
    p = reverse.make("x0", variance)
    x0 = jax.jit(jax.vmap(data.sample))(jax.random.split(jax.random.key(1), num_images))
    keys = jax.random.split(jax.random.key(2), num_images)

    @jax.jit
    def gap(x0, keys):
        denoise = data.denoiser(p, schedule)
        bound_bpd = likelihood.bound_bpd(
            denoise, p, schedule, x0, keys, clip_x0=False, decoder=oracles.continuous_decoder
        )
        return bound_bpd * x0[0].size * np.log(2) + jax.vmap(data.log_prob)(x0)

    gaps = np.asarray(gap(x0, keys), np.float64)
    return gaps.mean(), gaps.std(ddof=1) / num_images**0.5


closed_form = jax.jit(oracles.gaussian_gap_nats, static_argnames="variance")
SCHEDULES = {
    "cosine": schedules.cosine,
    "harmonic": schedules.harmonic,
    "linear, respaced": lambda num_steps: schedules.evenly_spaced(schedules.linear(1000), num_steps),
}


@pytest.mark.parametrize("num_steps", [1, 2, 10, 100, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_with_exact_mean_and_variance_only_the_prior_is_missing(name, num_steps):
    """bound − exact NLL = KL(q(x_T) ‖ N(0, I)) within 3 standard errors, whose two sides are computed apart."""
    s = SCHEDULES[name](num_steps)
    gap, stderr = bound_gap_nats("learned", s, 512 if num_steps == 1000 else 2048)
    alpha_bar = np.prod(np.exp(np.asarray(s.log_alpha, np.float64)))
    mean, var = (np.asarray(leaf[0], np.float64) for leaf in (GAUSSIAN.mean, GAUSSIAN.var))
    end_var = alpha_bar * var + 1 - alpha_bar
    prior = 0.5 * np.sum(alpha_bar * mean**2 + end_var - 1 - np.log(end_var))
    assert stderr < 0.1  # nats, for both dimensions together
    # Each of T float32 terms has an error of some 1e-6.
    assert abs(gap - prior) < 3 * stderr + 1e-6 * num_steps, (gap, prior, stderr)
    closed = closed_form(GAUSSIAN, "learned", s)
    np.testing.assert_allclose(closed.prior, prior, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(closed.mismatch, 0.0)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_fixed_variances_cost_the_closed_form(variance, name):
    """The KL penalty of β̃ or β for T = 100 from β alone in float64, and from the bound itself to 1e-4 nats.

    A KL term of Gaussian data is quadratic in (x_0, ε), so four points per element, m ± s and ±1, have its mean.
    """
    num_steps = 100
    s = SCHEDULES[name](num_steps)
    beta, alpha_bar = np.asarray(s.beta, np.float64)[1:], np.exp(np.cumsum(np.asarray(s.log_alpha, np.float64)))
    before, alpha_bar = alpha_bar[:-1], alpha_bar[1:]
    beta_tilde = beta * (1 - before) / (1 - alpha_bar)
    mean, var = (np.asarray(leaf[0], np.float64).ravel()[:, None] for leaf in (GAUSSIAN.mean, GAUSSIAN.var))
    exact = beta_tilde + before * beta**2 / (1 - alpha_bar) ** 2 * var * (1 - alpha_bar) / (
        alpha_bar * var + 1 - alpha_bar
    )
    chosen = (beta if variance == "fixed_large" else beta_tilde) + np.zeros_like(exact)
    chosen[:, 0] = beta_tilde[1]  # the decoder's width
    penalty = 0.5 * (np.log(chosen / exact) + exact / chosen - 1)
    closed = closed_form(GAUSSIAN, variance, s)
    np.testing.assert_allclose(closed.mismatch.sum(), penalty.sum(), atol=1e-4)
    assert penalty[:, 1:].sum() > 0.01

    signs = np.array([(-1, -1), (-1, 1), (1, -1), (1, 1)])
    x0 = jnp.asarray((mean.T + np.sqrt(var).T * signs[:, :1]).reshape(4, *SHAPE), jnp.float32)
    eps = jnp.asarray(np.broadcast_to(signs[:, 1:], (4, 2)).reshape(4, *SHAPE), jnp.float32)

    def term(row, p):
        x_t = jax.vmap(lambda x0, eps: row.sqrt_alpha_bar * x0 + row.sqrt_one_minus_alpha_bar * eps)(x0, eps)
        output = GAUSSIAN.denoiser(p, s)(x_t, jnp.full(4, row.network_t))

        def one(x0, x_t, output):
            decoder = oracles.continuous_decoder
            return likelihood.vlb_term_bpd(p, row, x0, x_t, output, clip_x0=False, decoder=decoder)

        return jax.vmap(one)(x0, x_t, output).mean() * 2 * jnp.log(2.0)

    measured, exactly = (
        jax.jit(jax.vmap(lambda row, v=v: term(row, reverse.make("v", v))))(s[1:]) for v in (variance, "learned")
    )
    np.testing.assert_allclose((measured - exactly).sum(), penalty.sum(), atol=1e-4)


def test_a_mixture_has_no_closed_form():
    with pytest.raises(ValueError, match="for 1 Gaussian, not for a mixture of 3"):
        oracles.gaussian_gap_nats(LINE, "fixed_small", schedules.cosine(3))
    with pytest.raises(ValueError, match="variance='learned', not for 'learned_range'"):
        LINE.denoiser(reverse.make("eps", "learned_range"), schedules.cosine(3))


def test_a_schedule_that_shrinks_the_image_is_refused():
    shrinking = schedules.from_gamma(np.linspace(-5, 3, 9), np.arange(9), x0_scale=0.5)
    with pytest.raises(ValueError, match="x0_scale does not preserve the variance"):
        LINE.denoiser(reverse.make("eps", "fixed_small"), shrinking)
    with pytest.raises(ValueError, match="x0_scale does not preserve the variance"):
        oracles.gaussian_gap_nats(GAUSSIAN, "fixed_small", shrinking)


@pytest.mark.parametrize("variance", ["learned_range", "npr"])
def test_a_network_s_own_variance_has_no_closed_form(variance):
    """Its raw output is no logarithm of a variance."""
    with pytest.raises(ValueError, match=f"fixed variance and for 'learned', not for '{variance}'"):
        oracles.gaussian_gap_nats(GAUSSIAN, variance, schedules.cosine(3))
