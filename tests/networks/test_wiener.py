"""A Wiener filter's estimate of v: the conditional mean for Gaussian images, and a channel of the network's input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from scipy.fft import idctn

from configs.records import share_with_wiener
from diffusion import learned_schedule, schedules
from diffusion.experiment import build
from diffusion.networks.unet import UNet
from diffusion.networks.wiener import spectrum, wiener_v

TINY = UNet(channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(), num_groups=4, out_channels=3)


def covariance(shape, power, chroma):
    """Of images whose cosines are independent, by SciPy's transform and a Gram–Schmidt basis of the colours."""
    height, width, channels = shape
    colours = np.eye(1)
    if channels == 3:
        colours, _ = np.linalg.qr(np.array([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]]).T)
        colours = colours.T
    variance = np.asarray(spectrum(shape, power, chroma), np.float64)
    root = []
    for i, j, k in np.ndindex(*shape):
        one = np.zeros((height, width))
        one[i, j] = variance[i, j, k] ** 0.5
        root.append((idctn(one, norm="ortho")[..., None] * colours[k]).ravel())
    return np.array(root).T @ np.array(root)


@pytest.mark.parametrize("shape, chroma", [((4, 6, 3), 0.1), ((8, 4, 1), 1.0)])
@pytest.mark.parametrize("gamma", [-8.0, 0.5, 9.0])
def test_it_is_the_mean_of_v_for_gaussian_images(shape, chroma, gamma):
    alpha_bar, noise = 1 / (1 + np.exp(gamma)), 1 / (1 + np.exp(-gamma))
    of_x0 = covariance(shape, 2.0, chroma)
    x = np.random.default_rng(0).normal(size=shape)
    inverse = np.linalg.inv(alpha_bar * of_x0 + noise * np.eye(len(of_x0)))
    x0 = np.sqrt(alpha_bar) * of_x0 @ inverse @ x.ravel()
    eps = np.sqrt(noise) * inverse @ x.ravel()
    found = wiener_v(jnp.asarray(x, jnp.float32)[None], jnp.array([gamma], jnp.float32), 2.0, chroma)[0]
    expected = np.sqrt(alpha_bar) * eps - np.sqrt(noise) * x0
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_each_image_has_its_own_noise():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    gamma = jnp.array([-4.0, 3.0])
    together = wiener_v(x, gamma, 3.0, 0.01)
    for k in range(2):
        np.testing.assert_allclose(together[k], wiener_v(x[k : k + 1], gamma[k : k + 1], 3.0, 0.01)[0], rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 8, 3), (4, 12, 1), (5, 3, 3)])
@pytest.mark.parametrize("power", [0.0, 2.0, 5.5])
def test_a_pixel_has_the_variance_of_photographs(shape, power):
    np.testing.assert_allclose(spectrum(shape, power, 0.02).mean(), 0.25, rtol=1e-6)
    diagonal = np.diag(covariance(shape, power, 0.02)).reshape(shape)
    np.testing.assert_allclose(diagonal.mean(), 0.25, rtol=1e-6)


def test_the_spectrum_falls_with_the_power_of_the_frequency():
    variance = spectrum((32, 32, 3), 3.0, 0.006)
    np.testing.assert_allclose(variance[24, 0] / variance[0, 24], 1, rtol=1e-6)
    np.testing.assert_allclose(variance[20, 0, 0] / variance[10, 0, 0], (401 / 101) ** -1.5, rtol=1e-5)
    np.testing.assert_allclose(variance[..., 1:] / variance[..., :1], 0.006, rtol=1e-5)
    wide = spectrum((4, 8, 1), 2.0, 1.0)  # a wave of the same length, along a side twice as long
    np.testing.assert_allclose(wide[2, 0], wide[0, 4], rtol=1e-6)


def test_the_estimate_joins_the_input():
    """A network that is given the estimate as channels of x does the same."""
    network = TINY.copy(wiener=(3.0, 0.01), gamma_line=(-5.0, 0.02))
    x, network_t = jax.random.normal(jax.random.key(0), (2, 8, 8, 3)), jnp.array([100.0, 700.0])
    shapes = jax.eval_shape(network.init, jax.random.key(0), x, network_t)["params"]
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(lambda leaf: 0.3 * draw(size=leaf.shape).astype(np.float32), shapes)
    shown = jnp.concatenate([x, wiener_v(x, -5.0 + 0.02 * network_t, 3.0, 0.01)], axis=-1)
    expected = TINY.apply({"params": params}, shown, network_t)
    np.testing.assert_allclose(network.apply({"params": params}, x, network_t), expected, rtol=1e-5, atol=1e-5)
    plain = flatten_dict(jax.eval_shape(TINY.init, jax.random.key(0), x, network_t)["params"])
    differing = {path for path, leaf in flatten_dict(shapes).items() if leaf.shape != plain[path].shape}
    assert differing == {("conv_in", "kernel")}


def test_the_network_is_told_the_noise_also_of_a_schedule_that_has_moved():
    config = share_with_wiener.get_config()
    experiment = build.experiment(config, (32, 32, 3), num_levels=256)
    at_0, slope = experiment.training.network.gamma_line
    params = learned_schedule.init(schedules.cosine(1000))
    params |= {"gamma_1": params["gamma_1"] - 1.0, "log_range": params["log_range"] + 0.2}
    for own in (params, learned_schedule.init(schedules.cosine(1000))):
        schedule = experiment.training.schedule.of_params({learned_schedule.SUBTREE: own})
        gamma = at_0 + slope * np.asarray(schedule.network_t, np.float64)[1:]
        np.testing.assert_allclose(gamma, -np.asarray(schedule.log_snr, np.float64)[1:], atol=1e-4)


@pytest.mark.parametrize("fields", [(3.0,), (-1.0, 0.1), (3.0, 0.0), (3.0, 1.5), (3.0, 0.1, 0.1)])
def test_other_fields_are_refused(fields):
    with pytest.raises(ValueError, match=r"unet\.wiener=.* must be \(power, chroma\)"):
        TINY.copy(wiener=fields, gamma_line=(0.0, 1.0)).check((8, 8, 3))


@pytest.mark.parametrize(
    "keys", [{"unet__wiener": (3.0, 0.01), "model__network": "unet"}, {"model__network": "unet(wiener=(3.0, 0.01))"}]
)
def test_it_needs_a_network_that_is_told_the_noise(keys, tiny):
    with pytest.raises(ValueError, match=r"unet\.wiener=\(3\.0, 0\.01\) .* model\.conditioning='gamma'"):
        build.experiment(tiny(**keys), (8, 8, 1), num_levels=17)
    build.experiment(tiny(**keys, model__conditioning="gamma"), (8, 8, 1), num_levels=17)
