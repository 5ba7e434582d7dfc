"""The forward process: one-step kernels compose to the marginal, and the posterior is Bayes' rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import gaussian, process, schedules

X0 = jnp.linspace(-1, 1, 12, dtype=jnp.float32).reshape(2, 2, 3)


@pytest.mark.parametrize("name", list(schedules.SCHEDULES))
def test_composed_steps_are_the_marginal(name):
    s = schedules.SCHEDULES[name](50)
    mean, variance = np.asarray(X0, np.float64), np.zeros(X0.shape)
    for t in range(1, 51):
        step = process.q_step(s[t], jnp.ones_like(X0))
        a = np.asarray(step.mean, np.float64)
        mean, variance = a * mean, a**2 * variance + np.exp(np.asarray(step.log_var, np.float64))
        marginal = process.q_marginal(s[t], X0)
        # 50 roundings of float32 accumulate; 2 · 50 · 6e-8.
        np.testing.assert_allclose(marginal.mean, mean, rtol=6e-6, atol=1e-7)
        np.testing.assert_allclose(np.exp(marginal.log_var), variance, rtol=6e-6)


@pytest.mark.parametrize("t", [2, 10, 300, 1000])
@pytest.mark.parametrize("make", [schedules.linear, schedules.cosine])
def test_posterior_is_bayes_rule(make, t):
    s = make(1000)
    key_prev, key_t = jax.random.split(jax.random.key(t))
    x_prev = process.q_marginal(s[t - 1], X0).sample(jax.random.normal(key_prev, X0.shape))
    x_t = process.q_step(s[t], x_prev).sample(jax.random.normal(key_t, X0.shape))
    posterior = gaussian.log_prob(process.q_posterior(s[t], X0, x_t), x_prev)
    by_bayes = (
        gaussian.log_prob(process.q_step(s[t], x_prev), x_t)
        + gaussian.log_prob(process.q_marginal(s[t - 1], X0), x_prev)
        - gaussian.log_prob(process.q_marginal(s[t], X0), x_t)
    )
    # Rounding x to 6e-8 moves z = (x − μ)/σ by 6e-8/σ, and σ is 0.01 at the linear schedule's start.
    np.testing.assert_allclose(posterior, by_bayes, atol=5e-4)


def test_posterior_at_the_first_step_is_the_data():
    for make in schedules.SCHEDULES.values():
        s = make(100)
        posterior = process.q_posterior(s[1], X0, X0 + 0.3)
        np.testing.assert_array_equal(posterior.mean, X0)
        np.testing.assert_array_equal(posterior.log_var, jnp.full_like(X0, s.log_beta_tilde[2]))


def test_samples_have_the_marginal_and_batches_are_vmaps():
    s = schedules.linear(1000)
    eps = jax.random.normal(jax.random.key(0), X0.shape)
    t = jnp.asarray([1, 500, 1000])
    batch = jax.jit(jax.vmap(process.q_sample, in_axes=(0, None, None)))(s[t], X0, eps)
    for i, one_t in enumerate([1, 500, 1000]):
        np.testing.assert_allclose(batch[i], process.q_marginal(s[one_t], X0).sample(eps), rtol=2e-6, atol=1e-6)


def test_gradients_flow():
    row = schedules.linear(10 * 10)[7]
    gradient = jax.grad(lambda x0: process.q_posterior(row, x0, X0).mean.sum())(X0)
    np.testing.assert_allclose(gradient, jnp.full_like(X0, row.posterior_x0), rtol=1e-6)
