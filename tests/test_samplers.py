"""Samplers against the closed-form recursion of Gaussian data, and their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import process, reverse, samplers, schedules

SHAPE = (64, 64, 1)
KEYS = jax.random.split(jax.random.key(0), 2)


def exact_eps(s):
    """E[ε | x_t] for x_0 ~ N(0, I): √(1 − ᾱ_t) x_t, looked up by network_t = t − 1."""
    return lambda x_t, network_t: s.sqrt_one_minus_alpha_bar[network_t.astype(int) + 1][:, None, None, None] * x_t


def test_variance_at_the_end_of_the_linear_schedule():
    """With the exact ε on N(0, I) data every step is linear, so the variance at the end is known."""
    s, keys = schedules.linear(1000), jax.random.split(jax.random.key(0), 8)

    def samples(variance):
        p = reverse.make("eps", variance)
        return jax.jit(lambda keys: samplers.ancestral(exact_eps(s), p, s, keys, (32, 64, 1), clip_x0=False)[0])(keys)

    large, small = (np.asarray(samples(variance), np.float64) for variance in ("fixed_large", "fixed_small"))
    np.testing.assert_allclose(large.var(), 0.99990, atol=3 * (2 / large.size) ** 0.5)
    np.testing.assert_allclose(large.mean(), 0.0, atol=4 / large.size**0.5)
    # Equal noise makes the two correlate by ρ = 0.999966, so that their variances' difference has a standard error of
    # 2 √((1 − ρ²)/n) = 1.3e-4.
    np.testing.assert_allclose(large.var() - small.var(), 0.99990 - 0.99107, atol=4e-4)


@pytest.mark.parametrize(("variance", "end"), [("fixed_large", 0.99990), ("fixed_small", 0.99107)])
def test_that_variance_is_the_recursion_of_the_reverse_process(variance, end):
    """v_{t−1} = a² v_t + σ_t², to five digits, without samples; no noise at t = 1."""
    s, p = schedules.linear(1000), reverse.make("eps", variance)

    def step(v, row):
        one = jnp.ones((1, 1, 1))
        p_prev, _ = p(row, one, row.sqrt_one_minus_alpha_bar * one, clip_x0=False)
        return p_prev.mean[0, 0, 0] ** 2 * v + jnp.where(row.t > 1, jnp.exp(p_prev.log_var[0, 0, 0]), 0.0), None

    v, _ = jax.lax.scan(step, jnp.ones(()), s[1:], reverse=True)
    np.testing.assert_allclose(v, end, atol=2e-5)


@pytest.mark.parametrize("method", samplers.SAMPLERS.values(), ids=samplers.SAMPLERS.keys())
def test_the_last_step_adds_no_noise(method):
    """At t = 1 the mean is x̂_0 itself, so the samples are the trajectory's last frame."""
    s, p = schedules.cosine(10), reverse.make("v", "fixed_large")
    x, frames = method(lambda x, t: 0.3 * x, p, s, KEYS, (4, 4, 1), num_frames=5)
    assert frames.shape == (5, 2, 4, 4, 1)
    # XLA may round the two differently, each by a few units in the last place of float32, which is 1.2e-7.
    np.testing.assert_allclose(x, frames[-1], rtol=4e-7)
    assert jnp.abs(x).max() <= 1.0  # x̂_0 is clipped


def test_the_trajectory_shows_every_part_of_the_way():
    s, p = schedules.cosine(6), reverse.make("x0", "fixed_small")

    def show_t(x, network_t):
        return jnp.ones_like(x) * network_t[:, None, None, None] / 10.0

    _, frames = samplers.ancestral(show_t, p, s, KEYS, (2, 2, 1), num_frames=3)
    np.testing.assert_allclose(frames[:, 0, 0, 0, 0], [0.4, 0.2, 0.0], atol=1e-6)  # t − 1 = 4, 2, 0 end the parts


def test_ddim_with_eta_1_is_ancestral_with_the_small_variance():
    s, p = schedules.cosine(50), reverse.make("eps", "fixed_small")
    ancestral, _ = samplers.ancestral(exact_eps(s), p, s, KEYS, SHAPE)
    ddim, _ = samplers.ddim(exact_eps(s), p, s, KEYS, SHAPE, eta=1.0)
    # The same noise, 50 steps: roundings of 6e-8 are multiplied by up to 1/√ᾱ_t on the way.
    np.testing.assert_allclose(ddim, ancestral, atol=2e-4)


def test_a_ddim_step_equals_float64_also_near_the_data():
    """1 − ᾱ_{t−1} from a float32 ᾱ would have a relative error of 8e-5 at t = 2."""
    s = schedules.linear(1000)
    alpha_bar = np.cumprod(np.concatenate([[1.0], 1 - np.linspace(1e-4, 0.02, 1000)]))
    for t in (2, 3, 500):
        for eta in (0, 0.5):
            x_t, x0_hat = np.full((1, 1, 1), 0.9, np.float32), np.full((1, 1, 1), 0.1, np.float32)
            eps_hat = (np.float64(x_t) - np.sqrt(alpha_bar[t]) * x0_hat) / np.sqrt(1 - alpha_bar[t])
            beta = 1 - alpha_bar[t] / alpha_bar[t - 1]
            variance = eta**2 * beta * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
            noise = np.sqrt(1 - alpha_bar[t - 1] - variance) * eps_hat
            mean = samplers.ddim_step(s[t], x_t, x0_hat, eta).mean
            np.testing.assert_allclose(mean, np.sqrt(alpha_bar[t - 1]) * x0_hat + noise, rtol=2e-6)


def test_ddim_with_eta_0_is_deterministic_and_keeps_the_variance():
    s, p = schedules.cosine(100), reverse.make("eps", "fixed_small")
    x, _ = samplers.ddim(exact_eps(s), p, s, KEYS, SHAPE, clip_x0=False)
    # For x_0 ~ N(0, I) the probability flow does not move any point.
    start = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), SHAPE))(KEYS)
    np.testing.assert_allclose(x, start, rtol=0.02, atol=0.02)  # first-order discretization of 100 steps


# x_0 ~ N(0.3, 0.5²), with ᾱ's log SNR falling evenly from 8 to -8 in 320 steps.
MEAN, VARIANCE = 0.3, 0.25
LOG_SNR = np.linspace(8, -8, 321)
ALPHA_BAR = 1 / (1 + np.exp(-LOG_SNR))
EVEN_IN_LOG_SNR = schedules.from_betas(1 - ALPHA_BAR / np.concatenate([[1.0], ALPHA_BAR[:-1]]))


def exact_x0(alpha_bar, x_t):
    """E[x_0 | x_t] of that Gaussian."""
    gain = alpha_bar**0.5 * VARIANCE / (alpha_bar * VARIANCE + 1 - alpha_bar)
    return MEAN + gain * (x_t - alpha_bar**0.5 * MEAN)


def exact_output(prediction):
    """That x̂_0 as a network with this prediction would say it."""
    p = reverse.make(prediction, "fixed_small")

    def one(row, x_t):
        x0 = exact_x0(row.alpha_bar, x_t)
        return p.target(row, x0, x_t, (x_t - row.sqrt_alpha_bar * x0) / row.sqrt_one_minus_alpha_bar)

    return p, lambda x_t, network_t: jax.vmap(one)(EVEN_IN_LOG_SNR[network_t.astype(int) + 1], x_t)


def error_to_the_exact_ode(method, prediction, num_steps):
    """Of `num_steps` + 1 steps, spread over the schedule, as a root mean square."""
    p, denoise = exact_output(prediction)
    short = schedules.respace(EVEN_IN_LOG_SNR, np.arange(1, 322, 320 // num_steps))
    x, _ = jax.jit(lambda keys: method(denoise, p, short, keys, (8, 8, 1), clip_x0=False))(KEYS)
    start = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (8, 8, 1)))(KEYS)
    # The probability flow keeps the distance from √ᾱ_t m in units of x_t's standard deviation; x_0 is x̂_0(x_1).
    std = np.sqrt(ALPHA_BAR * VARIANCE + 1 - ALPHA_BAR)
    x_1 = ALPHA_BAR[0] ** 0.5 * MEAN + std[0] / std[-1] * (np.float64(start) - ALPHA_BAR[-1] ** 0.5 * MEAN)
    return np.sqrt(np.mean((x - exact_x0(ALPHA_BAR[0], x_1)) ** 2))


@pytest.mark.parametrize(
    ("method", "order", "prediction"),
    [(samplers.ddim, 1, "eps"), (samplers.dpm_solver_pp, 2, "v"), (samplers.heun, 2, "x0")],
)
def test_halved_steps_halve_or_quarter_the_error(method, order, prediction):
    errors = [error_to_the_exact_ode(method, prediction, num_steps) for num_steps in (20, 40, 80)]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(orders, order, atol=0.25)


def test_second_order_pays_at_equal_network_evaluations():
    """41 of each: Heun's steps but the last take two."""
    ddim = error_to_the_exact_ode(samplers.ddim, "eps", 40)
    assert error_to_the_exact_ode(samplers.dpm_solver_pp, "eps", 40) < ddim / 5
    assert error_to_the_exact_ode(samplers.heun, "eps", 20) < ddim / 2


def test_dpm_solver_pp_begins_and_ends_with_ddim():
    s, p = schedules.harmonic(2), reverse.make("x0", "fixed_small")  # also where the SNR begins at 0
    runs = [
        method(lambda x, t: 0.3 * x, p, s, KEYS, (4, 4, 1))[0] for method in (samplers.ddim, samplers.dpm_solver_pp)
    ]
    np.testing.assert_array_equal(*runs)


def test_a_respaced_process_is_sampled_with_its_own_rows():
    s = schedules.linear(1000)
    short, p = schedules.evenly_spaced(s, 20), reverse.make("eps", "fixed_large")
    x, _ = samplers.ancestral(exact_eps(s), p, short, KEYS, SHAPE, clip_x0=False)
    v = 1.0
    for t in range(20, 0, -1):
        mean = p(short[t], jnp.ones((1, 1, 1)), short[t].sqrt_one_minus_alpha_bar * jnp.ones((1, 1, 1)), False)[0].mean
        v = float(mean[0, 0, 0]) ** 2 * v + (float(jnp.exp(short[t].log_beta_large)) if t > 1 else 0.0)
    np.testing.assert_allclose(x.var(), v, rtol=4 * (2 / x.size) ** 0.5)


def test_images_do_not_depend_on_the_batch():
    s, p = schedules.cosine(5), reverse.make("eps", "fixed_small")
    both, _ = samplers.ancestral(exact_eps(s), p, s, KEYS, (4, 4, 1))
    second, _ = samplers.ancestral(exact_eps(s), p, s, KEYS[1:], (4, 4, 1))
    np.testing.assert_allclose(both[1:], second, rtol=1e-6)
    assert not np.allclose(both[0], both[1])


def test_more_frames_than_steps_are_refused():
    s, p = schedules.cosine(3), reverse.make("eps", "fixed_small")
    with pytest.raises(ValueError, match="num_frames=4 must be in 1…3, the number of steps"):
        samplers.ancestral(exact_eps(s), p, s, KEYS, (4, 4, 1), num_frames=4)


def test_the_posterior_mean_is_what_ancestral_sampling_walks():
    """One step by hand: T = 2, and the sampler's noise is the image's own."""
    s, p = schedules.cosine(2), reverse.make("x0", "fixed_small")
    x0_hat = jnp.full((2, 2, 1), 0.25)
    x, _ = samplers.ancestral(lambda x, t: jnp.full_like(x, 0.25), p, s, KEYS[:1], (2, 2, 1))
    np.testing.assert_allclose(x[0], process.q_posterior(s[1], x0_hat, x0_hat).mean, rtol=1e-6)
