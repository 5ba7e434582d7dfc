"""The importance-weighted bound of a split lies between the bound and −log₂ P, which is known by quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import reverse, schedules
from diffusion.data import Source
from diffusion.evaluation.importance import Importance, Weights
from diffusion.exact import oracles
from diffusion.model import Model
from diffusion.runtime import devices

LEVELS, SAMPLES = 17, 512
LINE = oracles.Mixture(
    jnp.asarray([0.3, 0.7]), jnp.asarray([-0.6, 0.4]).reshape(2, 1, 1, 1), jnp.asarray([0.05, 0.02]).reshape(2, 1, 1, 1)
)
P, S = reverse.make("x0", "learned"), schedules.cosine(20)
MODEL = Model(LINE.denoiser(P, S), P, S, LEVELS)
# Images of one pixel, without the levels in the tails, whose weights are too unequal to be known from few.
LIKELY = np.arange(4, 15)
SOURCE = Source("line", "test", LIKELY.astype(np.uint8).reshape(-1, 1, 1, 1), LEVELS)
NUMBERS = np.arange(len(LIKELY))


@pytest.fixture(scope="module")
def weights():
    return Importance(SAMPLES).of_split(0, 4096, "exact")(devices.replicate(MODEL), SOURCE, NUMBERS)


def exact_bpd():
    """−log₂ P(x_0) of the chain with its discretized decoder, for every level, by quadrature over x_T, …, x_1."""
    x = np.linspace(-6, 6, 2001)
    density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    x_t = jnp.asarray(x, jnp.float32).reshape(-1, 1, 1, 1)

    @jax.jit
    def reverse_process(row):
        output = MODEL.denoise(x_t, jnp.full(len(x), row.network_t))
        return jax.vmap(lambda x, out: P(row, x, out, True)[0])(x_t, output)

    for t in range(S.num_steps, 0, -1):
        g = reverse_process(S[t])
        if t == 1:
            mass = np.asarray(P.level_probs(g, LEVELS), np.float64).reshape(len(x), LEVELS)
            return -np.log2(np.trapezoid(mass.T * density, x, axis=1))
        mean, var = np.asarray(g.mean, np.float64).ravel(), np.exp(np.asarray(g.log_var, np.float64)).ravel()
        kernel = np.exp(-((x[:, None] - mean[None]) ** 2) / (2 * var)) / np.sqrt(2 * np.pi * var)
        density = np.trapezoid(kernel * density, x, axis=1)


def test_it_lies_between_the_bound_and_the_likelihood(weights):
    exact = exact_bpd()
    np.testing.assert_allclose((2.0**-exact).sum(), 1, rtol=1e-4)  # a probability
    exact = exact[LIKELY]
    means = [weights.bpd(k).mean() for k in (1, 8, 64, SAMPLES)]
    assert means[0] > means[1] + 0.01 and means[1] > means[2] > exact.mean() - 3 * weights.sampling_stderr
    # With all weights it is the likelihood, within the error that it states.
    assert 0 < weights.sampling_stderr < 0.02
    assert abs(means[3] - exact.mean()) < 3 * weights.sampling_stderr, (means, exact.mean(), weights.sampling_stderr)


def test_the_stated_error_is_the_spread_of_other_trajectories(weights):
    """Groups of 64 trajectories are independent evaluations: their means spread as one of them says."""
    groups = [Weights(weights.log_weights_nats[:, 64 * i : 64 * (i + 1)], 1) for i in range(SAMPLES // 64)]
    spread = np.std([group.bpd(64).mean() for group in groups], ddof=1)
    stated = np.mean([group.sampling_stderr for group in groups])
    assert 0.5 < stated / spread < 2, (stated, spread)  # of 8 groups: χ² with 7 degrees of freedom, 99%


def test_the_effective_sample_size_of_known_weights():
    found = Weights(np.log([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1e-9, 1e-9], [1.0, 1e-9, 1e-9, 1e-9]]), 1)
    np.testing.assert_allclose(found.effective, [4, 2, 1], rtol=1e-6)
    summary = found.summary("test")
    assert summary["test_importance_ess_min"] == pytest.approx(1) and summary["test_importance_images"] == 3
    np.testing.assert_allclose(found.bpd(4), [0, 1, 2], atol=1e-6)
    assert list(summary["test_importance_bpd_by_samples"]) == ["1", "2", "4"]
    # The weights 1, 1, 0, 0: variance 1/3 of mean ½, so a relative variance of the mean of (1/3)/(1/4)/4.
    one = Weights(np.log([[1.0, 1.0, 1e-9, 1e-9]]), 1)
    np.testing.assert_allclose(one.sampling_stderr * np.log(2), (1 / 3) ** 0.5, rtol=1e-6)


@pytest.mark.parametrize("samples", [0, 1])
def test_one_trajectory_is_the_bound(samples):
    with pytest.raises(ValueError, match=f"samples={samples} must be in 2…1,000,000"):
        Importance(samples)
