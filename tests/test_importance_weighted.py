"""The importance-weighted bound, for models whose log p(x_0) is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import likelihood, reverse, schedules
from diffusion.exact import oracles

LINE = oracles.Mixture(
    jnp.asarray([0.3, 0.7]), jnp.asarray([-1.0, 0.7]).reshape(2, 1, 1, 1), jnp.asarray([0.1, 0.04]).reshape(2, 1, 1, 1)
)
P = reverse.make("x0", "fixed_large")
S = schedules.evenly_spaced(schedules.linear(1000), 5)


def model_log_prob(x0):
    """log p_θ(x_0) of the chain of exact means and variances β, by quadrature over x_T, …, x_1 in float64."""
    x = np.linspace(-6, 6, 3001)
    density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    denoise, x_t = LINE.denoiser(P, S), jnp.asarray(x, jnp.float32).reshape(-1, 1, 1, 1)

    @jax.jit
    def reverse_process(row):
        output = denoise(x_t, jnp.full(len(x), row.network_t))
        return jax.vmap(lambda x, out: P(row, x, out, False)[0])(x_t, output)

    for t in range(S.num_steps, 0, -1):
        g = reverse_process(S[t])
        mean, var = np.asarray(g.mean, np.float64).ravel(), np.exp(np.asarray(g.log_var, np.float64)).ravel()
        to = x if t > 1 else np.asarray(x0, np.float64).ravel()
        kernel = np.exp(-((to[:, None] - mean[None]) ** 2) / (2 * var)) / np.sqrt(2 * np.pi * var)
        density = np.trapezoid(kernel * density, x, axis=1)
    return np.log(density)


@pytest.fixture(scope="module")
def log_weights():
    """Three images' weights, 8,000 trajectories each."""
    x0 = jnp.asarray([-1.2, 0.1, 0.8]).reshape(3, 1, 1, 1)
    keys = jax.random.split(jax.random.key(0), 3 * 8000)

    @jax.jit
    def weights(keys):
        return likelihood.log_weights_nats(
            LINE.denoiser(P, S), P, S, jnp.repeat(x0, 8000, axis=0), keys,
            clip_x0=False, decoder=oracles.continuous_decoder,
        )  # fmt: skip

    return x0, weights(keys).reshape(3, 8000)


def mean_and_stderr(groups):
    groups = np.asarray(groups, np.float64)
    return groups.mean(axis=1), groups.std(axis=1, ddof=1) / groups.shape[1] ** 0.5


def test_weights_average_to_the_likelihood(log_weights):
    """E[exp log w] = p_θ(x_0): the defining law, with a model whose p_θ is a quadrature away."""
    x0, weights = log_weights
    ratio, stderr = mean_and_stderr(np.exp(np.asarray(weights) - model_log_prob(x0)[:, None]))
    assert np.all(stderr < 0.05) and np.all(np.abs(ratio - 1) < 3 * stderr), (ratio, stderr)


def test_it_rises_with_k_from_the_bound_to_the_likelihood(log_weights):
    x0, weights = log_weights
    exact, before = model_log_prob(x0), -np.inf
    for k in (1, 10, 100, 1000):
        mean, stderr = mean_and_stderr(likelihood.importance_weighted_nats(weights, k))
        assert np.all(mean > before), k
        assert np.all(mean < exact + 3 * stderr), (k, mean, exact, stderr)
        before = mean
    # Eight groups of 1,000 are at the likelihood within their error; the bound itself is clearly below it.
    assert np.all(np.abs(mean - exact) < 4 * stderr + 1e-3), (mean, exact, stderr)
    bound, bound_stderr = mean_and_stderr(weights)
    assert np.all(bound + 3 * bound_stderr < exact)


def test_one_sample_is_the_bound(log_weights):
    x0, weights = log_weights
    denoise, num_keys = LINE.denoiser(P, S), 4000
    keys = jax.random.split(jax.random.key(1), num_keys)
    for image, log_weight, stderr in zip(x0, *mean_and_stderr(weights), strict=True):
        copies = jnp.broadcast_to(image[None], (num_keys, *image.shape))
        bounds = likelihood.bound_bpd(denoise, P, S, copies, keys, clip_x0=False, decoder=oracles.continuous_decoder)
        (bound,), (bound_stderr,) = mean_and_stderr(bounds[None] * np.log(2))
        assert abs(bound + log_weight) < 3 * np.hypot(stderr, bound_stderr)


def test_groups_must_be_whole(log_weights):
    with pytest.raises(ValueError, match="8000 samples do not make whole groups of K=7"):
        likelihood.importance_weighted_nats(log_weights[1], 7)
