"""The probability-flow ODE for data with a known log p(x)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import reverse, schedules
from diffusion.exact import ode, oracles

LINE = oracles.Mixture(
    jnp.asarray([0.2, 0.5, 0.3]),
    jnp.asarray([-1.5, 0.0, 1.0]).reshape(3, 1, 1, 1),
    jnp.asarray([0.16, 0.04, 0.09]).reshape(3, 1, 1, 1),
)
PLANE = oracles.Mixture(
    jnp.asarray([0.5, 0.3, 0.2]),
    jnp.asarray([[1.0, 0.5], [-1.0, 0.8], [0.0, -1.2]]).reshape(3, 1, 1, 2),
    jnp.asarray([[0.04, 0.16], [0.1, 0.1], [0.3, 0.02]]).reshape(3, 1, 1, 2),
)
END = -20.0  # where N(0, I) is the law of x_t to 1e-4


@pytest.mark.parametrize(("data", "log_snr"), [(PLANE, 4.0), (PLANE, 14.0), (LINE, 14.0)])
def test_exact_trace_gives_the_exact_likelihood(data, log_snr):
    """To 1e-4 nats: at a finite log-SNR the diffused mixture's, at a large one the data's own."""
    x0 = jax.vmap(data.sample)(jax.random.split(jax.random.key(0), 16))
    signal = np.sqrt(1 / (1 + np.exp(-log_snr)))
    solve = jax.jit(jax.vmap(lambda x: ode.solve(data.eps, x, log_snr, END, tolerance=1e-6)))
    solution = solve(jnp.float32(signal) * x0)
    exact = jax.vmap(data.diffused(jnp.float32(log_snr)).log_prob)(jnp.float32(signal) * x0)
    np.testing.assert_allclose(solution.log_prob_nats, exact, atol=1e-4)
    if log_snr > 10:
        density_of_x0 = solution.log_prob_nats + x0[0].size * np.log(signal)
        np.testing.assert_allclose(density_of_x0, jax.vmap(data.log_prob)(x0), atol=1e-4)


@pytest.mark.parametrize("probes", [jax.random.rademacher, jax.random.normal])
def test_hutchinson_is_unbiased(probes):
    """The mean over 2,000 probes is the exact log p(x) within 3 standard errors, and the spread is not zero."""
    x = PLANE.mean[0] + 0.1
    probe = probes(jax.random.key(3), (2000, *x.shape), jnp.float32)

    def log_prob(probe):
        return ode.solve(PLANE.eps, x, 4.0, END, ode.hutchinson(probe), 1e-4).log_prob_nats

    estimates = np.asarray(jax.jit(jax.vmap(log_prob))(probe), np.float64)
    stderr = estimates.std(ddof=1) / len(estimates) ** 0.5
    exact = PLANE.diffused(jnp.float32(4.0)).log_prob(x)
    assert 1e-4 < stderr < 0.05
    assert abs(estimates.mean() - exact) < 3 * stderr + 1e-3, (estimates.mean(), exact, stderr)


def test_divergences_of_a_linear_map():
    matrix = jax.random.normal(jax.random.key(0), (6, 6))

    def f(x):
        return (matrix @ x.ravel()).reshape(x.shape)

    x, probe = jax.random.normal(jax.random.key(1), (2, 1, 2, 3))
    for divergence, expected in (
        (ode.exact_divergence, jnp.trace(matrix)),
        (ode.hutchinson(probe), probe.ravel() @ matrix @ probe.ravel()),
        (ode.hutchinson_each(jnp.stack([probe, 2 * x])), [v.ravel() @ matrix @ v.ravel() for v in (probe, 2 * x)]),
    ):
        value, found = divergence(f, x)
        np.testing.assert_allclose(value, f(x), rtol=1e-5)
        np.testing.assert_allclose(found, np.asarray(expected), rtol=1e-5)


def test_where_the_solver_does_not_arrive_nothing_is_said(monkeypatch):
    monkeypatch.setattr(ode, "MAX_STEPS", 3)
    assert np.isnan(ode.solve(PLANE.eps, PLANE.mean[0], 4.0, END).log_prob_nats)


@pytest.mark.parametrize(
    ("prediction", "make"), [("eps", schedules.cosine), ("v", schedules.cosine), ("x0", schedules.harmonic)]
)
def test_a_network_is_the_oracle_at_its_own_steps(prediction, make):
    """eps_predictor undoes every prediction, at log-SNRs of the schedule; harmonic's last is −∞ and left out."""
    s, p = make(20), reverse.make(prediction, "learned")
    predict = ode.eps_predictor(PLANE.denoiser(p, s), p, s, clip_x0=False)
    for t in (1, 19):
        x = PLANE.diffused(s.log_snr[t]).sample(jax.random.key(t))
        np.testing.assert_allclose(jax.jit(predict)(x, s.log_snr[t]), PLANE.eps(x, s.log_snr[t]), rtol=2e-3, atol=2e-4)


def test_between_steps_the_network_is_asked_for_a_fraction():
    s, p = schedules.cosine(20), reverse.make("eps", "fixed_small")

    def echo(x, network_t):
        return jnp.broadcast_to(network_t[:, None, None, None], x.shape)

    predict, x = ode.eps_predictor(echo, p, s, clip_x0=False), jnp.zeros((1, 1, 1))
    between = 0.25 * s.log_snr[8] + 0.75 * s.log_snr[7]
    np.testing.assert_allclose(predict(x, between), 6.25, rtol=1e-3)
    # ε̂ = 6.25 at x = 0 means x̂_0 < −1; clipped, it is the ε that leads from −1 to 0.
    clipped = ode.eps_predictor(echo, p, s)(x, between)
    np.testing.assert_allclose(clipped, jnp.exp(0.5 * between), rtol=1e-4)
    with pytest.raises(ValueError, match="model.prediction='mean'"):
        ode.eps_predictor(echo, reverse.make("mean", "fixed_small"), s)


def test_dequantized_bits_of_a_known_density():
    """A wide Gaussian's bits per pixel value: the mean over the bin is the integral of −log₂(p · bin) over it."""
    std, num_levels = 0.8, 17
    data = oracles.normal(jnp.zeros((1, 1, 1)), jnp.full((1, 1, 1), std))
    s, p = schedules.linear(1000), reverse.make("eps", "fixed_small")
    predict = ode.eps_predictor(between_rows(data, s), p, s, clip_x0=False)
    x0 = jnp.full((1, 1, 1), 0.25)
    uniform = (jnp.arange(32.0) + 0.5).reshape(32, 1, 1, 1) / 32
    bpd = jax.jit(jax.vmap(lambda u: ode.dequantized_bpd(predict, s, x0, u, num_levels)))(uniform)
    y = 0.25 + (np.arange(3200) + 0.5) / 3200 / 8 - 1 / 16
    nats = 0.5 * (np.log(2 * np.pi * std**2) + y**2 / std**2) - np.log(1 / 8)
    np.testing.assert_allclose(bpd.mean(), nats.mean() / np.log(2), atol=1e-3)


def between_rows(data, schedule):
    """The oracle for fractional network_t too."""

    def denoise(x_t, network_t):
        log_snr = jnp.interp(network_t, schedule.network_t[1:], schedule.log_snr[1:])
        return jax.vmap(data.eps)(x_t, log_snr)

    return denoise
