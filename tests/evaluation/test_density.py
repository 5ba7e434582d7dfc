"""The ODE's density of a split against the closed form of correlated Gaussian data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy import stats

from diffusion import reverse, schedules
from diffusion.data import Source
from diffusion.data.levels import to_unit
from diffusion.evaluation.density import Densities, Ode
from diffusion.exact import ode
from diffusion.model import Model
from diffusion.runtime import devices, randomness

LEVELS, SHAPE = 17, (2, 2, 1)
BIN = 2 / (LEVELS - 1)
S = schedules.linear(1000)
# Neighbours are alike, so that the Jacobian has off-diagonal elements and Hutchinson's estimate an error.
COV = 0.2 * np.array([[1.0, 0.8, 0.6, 0.5], [0.8, 1.0, 0.5, 0.6], [0.6, 0.5, 1.0, 0.8], [0.5, 0.6, 0.8, 1.0]])
# Images of class 1 have half the variance.
LABELS = np.arange(12, dtype=np.int32) % 2
PIXELS = np.random.default_rng(0).integers(3, 14, (12, *SHAPE), np.uint8)
SOURCE = Source("noise", "test", PIXELS, LEVELS, classes=LABELS, num_classes=2)
NUMBERS = np.arange(12)


def gaussian_denoise(axes, variances, x_t, network_t, labels):
    """E[ε | x_t] = σ (ᾱ Σ + σ² I)⁻¹ x_t, at any real network_t, along the axes of Σ."""
    variances = variances[None] / (1 + labels[:, None].astype(jnp.float32))
    log_snr = jnp.interp(network_t, S.network_t[1:], S.log_snr[1:])[:, None]
    alpha_bar, variance = jax.nn.sigmoid(log_snr), jax.nn.sigmoid(-log_snr)
    along = x_t.reshape(len(x_t), -1) @ axes
    return (jnp.sqrt(variance) * (along / (alpha_bar * variances + variance)) @ axes.T).reshape(x_t.shape)


VARIANCES, AXES = (jnp.asarray(part, jnp.float32) for part in np.linalg.eigh(COV))
MODEL = Model(Partial(gaussian_denoise, AXES, VARIANCES), reverse.make("eps", "fixed_small"), S, LEVELS, True)


def dequantized(name, seed=0):
    """What was drawn for each image."""
    key = jax.random.fold_in(randomness.stream(seed, "ode"), SOURCE.split_number)
    keys = randomness.per_item(key, jnp.asarray(NUMBERS))
    x0 = to_unit(jnp.asarray(SOURCE.pixels), LEVELS)
    return jax.vmap(lambda key, image: ode.DEQUANTIZATIONS[name](jax.random.split(key)[0], image, S, LEVELS))(keys, x0)


def closed_form_bpd(name):
    """−log₂ of the density that √ᾱ_1 y has at λ_1, and of the noise, in float64."""
    y, log_noise = (np.asarray(leaf, np.float64) for leaf in dequantized(name))
    alpha_bar = float(S.alpha_bar[1])
    covs = [COV / (1 + label) + (1 - alpha_bar) / alpha_bar * np.eye(4) for label in LABELS]
    pairs = zip(covs, y.reshape(-1, 4), strict=True)
    log_density = [stats.multivariate_normal(np.zeros(4), cov).logpdf(image) for cov, image in pairs]
    return (log_noise - log_density) / (4 * np.log(2))


def test_gaussian_data_have_their_closed_form_within_the_stated_errors():
    """The mean over images, to three of the standard errors that the probes' spread shows, and the solver's error."""
    likelihood = Ode(probes=4, tolerance=1e-4, dequantization="truncated_normal", clip_x0=False)
    found = likelihood.of_split(0, 64, "exact")(devices.replicate(MODEL), SOURCE, NUMBERS)
    wanted = closed_form_bpd("truncated_normal")
    error = found.image_bpd.mean() - wanted.mean()
    assert found.probes_bpd.shape == (12, 4) and 0.01 < found.probes_stderr < 0.1
    assert abs(error) < 3 * found.probes_stderr + found.solver_error_bpd, (error, found.probes_stderr)
    assert 0 < found.solver_error_bpd < 0.05
    # Image by image, too: what four probes leave is Student's t with 3 degrees of freedom.
    t = (found.image_bpd - wanted) / (found.probes_bpd.std(axis=1, ddof=1) / 2)
    assert np.abs(t).max() < 13 and np.median(np.abs(t)) < 1.5, t  # 12.9: once in 1,000


def test_the_errors_of_known_numbers():
    found = Densities(np.array([[1.0, 3.0], [2.0, 2.0]]), np.array([10.0, 20.0]), 0.001)
    summary = found.summary("test")
    assert summary["test_ode_density_bpd"] == 2 and summary["test_ode_density_bpd_stderr"] == 0
    # The two probes of the first image leave a variance of 2/2, of a mean over two images a quarter.
    assert summary["test_ode_density_bpd_probes_stderr"] == 0.5 and summary["test_ode_steps"] == 15
    assert Densities(np.ones((2, 1)), np.ones(2), 0.0).probes_stderr is None
    assert Densities(np.ones((2, 1)), np.ones(2), 0.0, is_exact=True).probes_stderr == 0


@pytest.mark.parametrize("dequantization", ["uniform", "truncated_normal"])
def test_the_noise_stays_in_the_bin_and_its_density_is_normalized(dequantization):
    """∫ q du = 1 over the bin, where q is what log_noise_nats says; for a schedule whose noise nearly fills the bin."""
    x0, schedule = jnp.zeros((1, 1, 1)), schedules.linear(100)
    drawn = jax.vmap(lambda key: ode.DEQUANTIZATIONS[dequantization](key, x0, schedule, LEVELS))
    y, log_noise = (np.asarray(leaf, np.float64).ravel() for leaf in drawn(jax.random.split(jax.random.key(0), 4000)))
    assert np.abs(y).max() <= BIN / 2 * (1 + 1e-6)
    # E_q[1/q] is the length of what q covers.
    lengths = np.exp(-log_noise)
    stderr = lengths.std(ddof=1) / len(lengths) ** 0.5
    assert abs(lengths.mean() - BIN) < 3 * stderr + 1e-6, (lengths.mean(), BIN, stderr)
    std = float(jnp.exp(-0.5 * schedule.log_snr[1]))
    cut = BIN / 2 / std
    wanted = BIN / 12**0.5 if dequantization == "uniform" else stats.truncnorm(-cut, cut).std() * std
    np.testing.assert_allclose(y.std(), wanted, rtol=0.04)
