"""The objectives that train Var(ε | x_t): where each has its minimum, for data with a known posterior."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import objectives, reverse, schedules

S = schedules.cosine(40)
SHAPE = (1, 2, 1)
MEAN, COV = np.array([0.3, -0.2]), np.array([[0.25, 0.12], [0.12, 0.16]])  # of x_0, two dependent pixels
SIGNS = jnp.asarray(list(itertools.product((-1.0, 1.0), repeat=2)), jnp.float32).reshape(4, *SHAPE)
X_T = jnp.asarray([0.5, 0.1]).reshape(SHAPE)
X = np.array([0.5, 0.1])  # the same pixels


def posterior(row):
    """Cov(x_0 | x_t), and E(x_0 | x_t) as a matrix and an offset: A x_t + b."""
    alpha_bar = float(row.sqrt_alpha_bar) ** 2
    precision = np.linalg.inv(COV)
    cov = np.linalg.inv(precision + np.eye(2) * alpha_bar / (1 - alpha_bar))
    return cov, cov * float(row.sqrt_alpha_bar) / (1 - alpha_bar), cov @ precision @ MEAN


def draws(row):
    """Points of x_0 given x_t, and their ε: together they have the mean and the covariance of the posterior."""
    cov, matrix, offset = posterior(row)
    away = np.linalg.cholesky(cov).T * 2**0.5
    x0 = matrix @ X + offset + np.concatenate([away, -away])
    eps = (X - float(row.sqrt_alpha_bar) * x0) / float(row.sqrt_one_minus_alpha_bar)
    return (jnp.asarray(points, jnp.float32).reshape(4, *SHAPE) for points in (x0, eps))


def float32(*arrays):
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


def affine(p, row, x_t, weights):
    """The output of a network with x̂_0 = A x_t + b, and g = 0."""
    matrix, offset = weights
    x0_hat = (matrix @ x_t.ravel() + offset).reshape(SHAPE)
    eps_hat = (x_t - row.sqrt_alpha_bar * x0_hat) / row.sqrt_one_minus_alpha_bar
    return jnp.concatenate([p.target(row, x0_hat, x_t, eps_hat), jnp.zeros(SHAPE)], -1)


def curved(p, row, x_t, weights):
    """The output of a network that is not linear."""
    return jnp.concatenate([jnp.sin(weights @ x_t.ravel()).reshape(SHAPE) + x_t**2, jnp.zeros(SHAPE)], -1)


@partial(jax.jit, static_argnames=("name", "p", "network"))
def gradient(name, p, row, x0, eps, weights, network=affine):
    """Of the objective by the network's output: its mean over x_0 given x_t and, where it is probed, all signs."""
    objective = objectives.make(name, p, S.num_steps)
    denoise = partial(network, p, row, weights=weights)

    def loss(output, x0, eps, signs):
        slope = jax.jvp(denoise, (X_T,), (signs,))[1]
        probed = (signs, slope) if name in objectives.PROBED else ()
        return objective(row, x0, X_T, eps, output, *probed)[0]

    return p.split(jax.vmap(jax.grad(loss), (None, 0, 0, 0))(denoise(X_T), x0, eps, SIGNS).mean(0))


def best(*arguments, **network):
    """The g at which the gradient is 0: for two pixels it is 2 (g − best)/2."""
    return -np.asarray(gradient(*arguments, **network)[1]).ravel()


@pytest.mark.parametrize("prediction", ["eps", "v", "velocity"])
@pytest.mark.parametrize("name", objectives.OF_EPS_VARIANCE)
def test_with_an_exact_mean_each_is_least_at_the_variance_of_the_posterior(name, prediction):
    """So model.variance=npr has the diagonal of Cov(x_{t−1} | x_t), for pixels that depend on each other."""
    p = reverse.make(prediction, "npr")
    variance = jax.jit(lambda row, output: jnp.exp(p(row, X_T, output, clip_x0=False).p_prev.log_var).ravel())
    for t in (2, 20, 39):
        row = S[t]
        cov, *weights = posterior(row)
        found = best(name, p, row, *draws(row), float32(*weights))
        np.testing.assert_allclose(found, np.exp(np.float64(row.log_snr)) * np.diag(cov), rtol=2e-4, err_msg=f"t={t}")
        output = np.stack([np.zeros(2), found], -1).reshape(1, 2, 2).astype(np.float32)
        wanted = np.exp(np.float64(row.log_beta_tilde)) + np.float64(row.posterior_x0) ** 2 * np.diag(cov)
        np.testing.assert_allclose(variance(row, output), wanted, rtol=2e-4)


def test_with_a_wrong_mean_they_differ():
    """NPR has the squared error of ε̂, SN the second moment of ε less ε̂², OCM the network's own derivative."""
    row, p = S[25], reverse.make("v", "npr")
    cov, matrix, offset = posterior(row)
    wrong, bias = matrix * np.array([[0.7, 2.0], [0.5, 1.1]]), 0.2
    weights = float32(wrong, offset + bias)
    found = {name: best(name, p, row, *draws(row), weights) for name in objectives.OF_EPS_VARIANCE}
    alpha, sigma = float(row.sqrt_alpha_bar), float(row.sqrt_one_minus_alpha_bar)
    variance = (alpha / sigma) ** 2 * np.diag(cov)
    eps_mean = (X - alpha * (matrix @ X + offset)) / sigma
    eps_hat = (X - alpha * (wrong @ X + offset + bias)) / sigma
    np.testing.assert_allclose(found["npr"], variance + (eps_mean - eps_hat) ** 2, rtol=1e-4)
    np.testing.assert_allclose(found["sn"], variance + eps_mean**2 - eps_hat**2, rtol=1e-4)
    np.testing.assert_allclose(found["ocm"], alpha * np.diag(wrong), rtol=1e-4)


def test_the_mean_is_trained_by_l_simple_alone():
    row, p = S[25], reverse.make("v", "npr")
    _, matrix, offset = posterior(row)
    of_mean = {
        name: gradient(name, p, row, *draws(row), float32(0.5 * matrix, offset))[0]
        for name in ("simple", *objectives.OF_EPS_VARIANCE)
    }
    for found in of_mean.values():
        np.testing.assert_allclose(found, of_mean["simple"], rtol=1e-5)
    assert np.abs(of_mean["simple"]).min() > 0


def test_ocm_follows_a_network_that_is_not_linear():
    """The mean over all signs is the diagonal of the Jacobian exactly, whatever the network."""
    row, p, weights = S[15], reverse.make("eps", "npr"), jnp.asarray([[0.4, -0.9], [1.3, 0.2]])

    def x0_hat(pixels):
        x_t = pixels.reshape(SHAPE)
        return p(row, x_t, curved(p, row, x_t, weights), clip_x0=False).x0_hat.ravel()

    diagonal = jnp.diag(jax.jit(jax.jacobian(x0_hat))(X_T.ravel()))
    found = best("ocm", p, row, *draws(row), weights, network=curved)
    np.testing.assert_allclose(found, row.sqrt_alpha_bar * diagonal, rtol=1e-5)
