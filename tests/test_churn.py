"""Churn: Heun's steps from noisier levels, by hand in float64 and by the marginals that they keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import reverse, samplers, schedules
from diffusion.churn import Churn
from diffusion.exact import oracles

X0 = reverse.make("x0", "fixed_small")
LOG_SNR = np.linspace(8, -8, 161)
ALPHA_BAR = 1 / (1 + np.exp(-LOG_SNR))
CHAIN = schedules.from_betas(1 - ALPHA_BAR / np.concatenate([[1.0], ALPHA_BAR[:-1]]))
KEPT = np.arange(1, 162, 20)
SHORT = schedules.respace(CHAIN, KEPT)
MEAN, STD = 0.3, 0.5


def drawn(step, schedule, shape, **more):
    data = oracles.normal(jnp.full(shape, MEAN), jnp.full(shape, STD))
    keys = jax.random.split(jax.random.key(0), 2)

    @jax.jit
    def draw(keys):
        denoise = data.denoiser(X0, CHAIN)
        return samplers.sample(step, denoise, X0, schedule, keys, shape, clip_x0=False, levels=CHAIN, **more)[0]

    return np.asarray(draw(keys), np.float64), keys


def exact_x0(t, x):
    a = ALPHA_BAR[t - 1]
    return MEAN + np.sqrt(a) * STD**2 / (a * STD**2 + 1 - a) * (x - np.sqrt(a) * MEAN)


def by_hand(keys, shape, s_churn, s_min, s_max, s_noise):
    """Karras et al. (2022), algorithm 2, for x/√ᾱ, whose noise is σ; their Euler step is taken for x̂_0."""
    sigma, num_steps = np.sqrt((1 - ALPHA_BAR) / ALPHA_BAR), len(KEPT)

    def noise(number):
        return np.float64(jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), shape))(keys))

    def toward(x, begin, end, x0):
        return x0 + end / begin * (x - x0)  # DDIM's step

    x = noise(0) / np.sqrt(ALPHA_BAR[-1])
    churned = []
    for i in range(num_steps, 0, -1):
        t = hat = KEPT[i - 1]
        gamma = min(s_churn / num_steps, np.sqrt(2) - 1)
        if s_min <= sigma[t - 1] <= s_max:
            hat = 1 + np.abs(np.log(sigma) - np.log((1 + gamma) * sigma[t - 1])).argmin()
        churned.append(hat - t)
        x_hat = x + np.sqrt(sigma[hat - 1] ** 2 - sigma[t - 1] ** 2) * s_noise * noise(num_steps + i)
        x0 = exact_x0(hat, x_hat * np.sqrt(ALPHA_BAR[hat - 1]))
        if i == 1:
            return x0, churned
        after = KEPT[i - 2]
        x = toward(x_hat, sigma[hat - 1], sigma[after - 1], x0)
        x0_after = exact_x0(after, x * np.sqrt(ALPHA_BAR[after - 1]))
        x = toward(x_hat, sigma[hat - 1], sigma[after - 1], (x0 + x0_after) / 2)


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ((2.0, 0.04, 10.0, 1.1), [0, 0, 4, 4, 4, 4, 4, 4, 0]),
        # Never more than √2 times the noise, and not beyond the noisiest level.
        ((99.0, 0.0, np.inf, 1.0), [0, 7, 7, 7, 7, 7, 7, 7, 7]),
    ],
)
def test_its_numbers_are_those_of_the_algorithm(arguments, steps):
    found, keys = drawn(samplers.heun(*arguments), SHORT, (2, 2, 1))
    wanted, churned = by_hand(keys, (2, 2, 1), *arguments)
    assert churned == steps
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_the_marginals_stay_those_of_the_data():
    """8,192 pixels: a standard error of the standard deviation of 0.8%."""
    schedule = schedules.respace(CHAIN, np.arange(1, 162, 2))
    found, _ = drawn(samplers.heun(s_churn=8), schedule, (64, 64, 1))
    # x_0 is x̂_0 of x_1: without the noise that was left, which is 3e-4 of the variance 0.25.
    np.testing.assert_allclose([found.mean(), found.std()], [MEAN, STD], atol=0.015)


def test_levels_that_are_not_known_are_not_visited():
    """Of the schedule's own levels alone the nearest is the present one, so it is Heun's method without noise."""
    shape, keys = (2, 2, 1), jax.random.split(jax.random.key(0), 2)
    denoise = oracles.normal(jnp.full(shape, MEAN), jnp.full(shape, STD)).denoiser(X0, CHAIN)
    both = [samplers.sample(step, denoise, X0, SHORT, keys, shape)[0] for step in (samplers.heun(), samplers.heun(3.0))]
    np.testing.assert_allclose(*both, atol=1e-5)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="s_churn=1, s_min=3, s_max=2.* s_min at most s_max"):
        Churn(1, 3, 2)
    with pytest.raises(ValueError, match="s_churn=-1"):
        samplers.heun(s_churn=-1)
    with pytest.raises(ValueError, match="s_noise=1.01 have no effect with s_churn=0"):
        samplers.heun(s_noise=1.01)
