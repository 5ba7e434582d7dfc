"""UniPC: its order of convergence on a mixture of Gaussians, and its numbers by the paper's formulas in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from diffusion import reverse, samplers, schedules
from diffusion.exact import oracles

X0 = reverse.make("x0", "fixed_small")
WEIGHT, MEAN, VAR = np.array([0.4, 0.6]), np.array([-0.6, 0.5]), np.array([0.04, 0.09])
MIXTURE = oracles.Mixture(
    jnp.float32(WEIGHT), jnp.float32(MEAN).reshape(2, 1, 1, 1), jnp.float32(VAR).reshape(2, 1, 1, 1)
)
STARTS = np.array([-1.5, -0.5, 0.2, 1.0])
KEYS = jax.random.split(jax.random.key(0), len(STARTS))  # which draw nothing


def spaced(log_snr):
    """The process with these log SNR, the highest first."""
    alpha_bar = 1 / (1 + np.exp(-np.asarray(log_snr)))
    return schedules.from_betas(1 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]]))


def drawn(order, schedule):
    start = jnp.float32(STARTS).reshape(-1, 1, 1, 1)
    step, denoise = samplers.unipc(order), MIXTURE.denoiser(X0, schedule)

    @jax.jit
    def draw(x_T):
        return samplers.sample(step, denoise, X0, schedule, KEYS, (1, 1, 1), clip_x0=False, x_T=x_T)[0]

    return np.asarray(draw(start), np.float64).ravel()


def exact_x0(log_snr, x):
    """E[x_0 | x_t] of the mixture, in float64."""
    alpha_bar = 1 / (1 + np.exp(-log_snr))
    mean, var = np.sqrt(alpha_bar) * MEAN, alpha_bar * VAR + 1 - alpha_bar
    joint = WEIGHT * norm.pdf(x[:, None], mean, np.sqrt(var))
    means = MEAN + np.sqrt(alpha_bar) * VAR / var * (x[:, None] - mean)
    return (joint * means).sum(axis=1) / joint.sum(axis=1)


def along_the_ode(begin, end):
    """Where the ODE carries STARTS from one log SNR to another: in one dimension it keeps the distribution function."""

    def cdf(x, log_snr):
        alpha_bar = 1 / (1 + np.exp(-log_snr))
        return (WEIGHT * norm.cdf(x, np.sqrt(alpha_bar) * MEAN, np.sqrt(alpha_bar * VAR + 1 - alpha_bar))).sum()

    return np.array([brentq(lambda y, x=x: cdf(y, end) - cdf(x, begin), -6, 6, xtol=1e-13) for x in STARTS])


def test_the_corrector_makes_the_order_one_more_than_the_predictor_s(order=3):
    """As Zhao et al. (2023) prove. In float64 and up to 160 steps orders 1, 2 and 3 converge with 2.0, 2.9 and 3.9."""
    exact = exact_x0(8.0, along_the_ode(-8.0, 8.0))
    coarse, fine = (np.sqrt(np.mean((drawn(order, spaced(np.linspace(8, -8, n + 1))) - exact) ** 2)) for n in (20, 40))
    np.testing.assert_allclose(np.log2(coarse / fine), order + 1, atol=0.3)


def by_the_paper(order, log_snr):
    """UniPC-p for x̂_0 with B(h) = e^h − 1: its linear systems R_p(h) a_p = φ_p(h)/B(h), step by step.

    λ = log √ᾱ/σ. One x̂_0 before the present one, or none but the corrector's, has the coefficient ½.
    """
    rates = np.array(log_snr) / 2
    alpha, sigma = 1 / np.sqrt(1 + np.exp(-2 * rates)), 1 / np.sqrt(1 + np.exp(2 * rates))
    x, seen = STARTS.copy(), [(rates[-1], exact_x0(log_snr[-1], STARTS))]
    for i in range(len(rates) - 2, -1, -1):
        (last, now), *before = seen[: min(order, len(seen))]
        h = rates[i] - last
        ratios = [(rate - last) / h for rate, _ in before] + [1.0]
        differences = [(x0 - now) / ratio for (_, x0), ratio in zip(before, ratios, strict=False)]
        matrix = np.array([[ratio**k for ratio in ratios] for k in range(len(ratios))])
        # φ_1(h) = (e^h − 1)/h, φ_{k+1} = (φ_k − 1/k!)/h, here of −h.
        phi, right = np.expm1(-h) / -h, []
        for k in range(1, len(ratios) + 1):
            phi = (phi - 1 / math.factorial(k)) / -h
            right.append(-h * phi * math.factorial(k) / np.expm1(-h))
        predictor = [0.5] if len(before) == 1 else np.linalg.solve(matrix[:-1, :-1], right[:-1])
        corrector = [0.5] if not before else np.linalg.solve(matrix, right)
        moved = sigma[i] / np.exp(np.log(sigma[i + 1])) * x - alpha[i] * np.expm1(-h) * now

        def repaired(coefficients, terms, moved=moved, i=i, h=h):
            return moved - alpha[i] * np.expm1(-h) * sum(c * d for c, d in zip(coefficients, terms, strict=True))

        x0 = exact_x0(log_snr[i], repaired(predictor, differences))
        x = repaired(corrector, [*differences, x0 - now])
        seen = [(rates[i], x0), *seen]
    return seen[0][1]  # the last step ends at x̂_0


@pytest.mark.parametrize("order", [2, 3])
def test_its_numbers_are_those_of_the_paper_s_formulas(order):
    log_snr = [7.0, 5.5, 3.0, 1.0, 0.0, -2.0, -2.5, -5.0]
    np.testing.assert_allclose(drawn(order, spaced(log_snr)), by_the_paper(order, log_snr), atol=2e-5)


def test_orders_that_it_has_not_are_refused():
    with pytest.raises(ValueError, match="order must be 1, 2 or 3, not 4"):
        samplers.unipc(order=4)
