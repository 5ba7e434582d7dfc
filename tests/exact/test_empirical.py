"""The exact posterior of a finite data set against brute force in float64, and its optimality."""

import jax
import numpy as np
import pytest

from diffusion import process, reverse, samplers, schedules
from diffusion.data.levels import to_levels
from diffusion.exact import empirical
from diffusion.model import Model
from diffusion.runtime import devices

# x̂_0 is a sum of float32 numbers, whose order depends on the CPU: three roundings of numbers up to 1 were seen, of
# 2^-24 each. √ᾱ_t x̂_0 is rounded once more, and ε is this over √(1 − ᾱ_t).
ROUNDINGS = 4 * 2.0**-24

@jax.jit
def posterior_of(data, row, x_t):
    return empirical.weights(data, row, x_t), empirical.posterior(data, row, x_t)


def twins(num_levels, shape, seed=0):
    """100 images: 50 and their twins, which differ in a few numbers by one level, so that t = 1 is no foregone case."""
    rng = np.random.default_rng(seed)
    images = np.tile(rng.integers(0, num_levels, (50, *shape)), (2, 1, 1, 1))
    for twin in images[50:].reshape(50, -1):
        where = rng.choice(twin.size, rng.integers(1, twin.size // 8), replace=False)
        twin[where] += np.where(twin[where] > num_levels // 2, -1, 1)
    return images.astype(np.uint8)


def unit(images, num_levels):
    return images.astype(np.float64) / ((num_levels - 1) / 2) - 1


def latents(s, images, num_levels, t, seed=0):
    """x_t [len(t), H, W, C] of randomly drawn images."""
    rng = np.random.default_rng(seed)
    x0 = unit(images, num_levels).astype(np.float32)[rng.integers(0, len(images), len(t))]
    return jax.jit(jax.vmap(process.q_sample))(s[t], x0, rng.standard_normal(x0.shape).astype(np.float32))


def brute_force(images, num_levels, row, x_t):
    """Weights [B, N], E[x_0 | x_t] and E[ε | x_t] [B, D], and entropy [B], from the definition in float64."""
    x0, x_t = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (unit(images, num_levels), x_t))
    signal, noise = (np.asarray(a, np.float64)[:, None] for a in (row.sqrt_alpha_bar, row.sqrt_one_minus_alpha_bar))
    distance = np.stack([np.sum((x - a * x0) ** 2, axis=1) for x, a in zip(x_t, signal, strict=True)])
    weight = np.exp(-(distance - distance.min(axis=1, keepdims=True)) / (2 * noise**2))
    weight /= weight.sum(axis=1, keepdims=True)
    x0_mean = weight @ x0
    entropy = -np.sum(weight * np.log(np.where(weight > 0, weight, 1)), axis=1)
    return weight, x0_mean, (x_t - signal * x0_mean) / noise, entropy


@pytest.mark.parametrize(("num_levels", "shape"), [(17, (8, 8, 1)), (256, (8, 8, 3))])
@pytest.mark.parametrize("make", [schedules.linear, schedules.cosine])
def test_equals_brute_force_at_every_t(make, num_levels, shape):
    s, images = make(1000), twins(num_levels, shape)
    data, t = empirical.in_blocks(images, num_levels, block_size=32), np.arange(1, 1001)
    x_t = latents(s, images, num_levels, t)
    weight, posterior = posterior_of(data, s[t], x_t)
    eps = empirical.denoiser(data, s, reverse.make("eps", "fixed_small"))(x_t, s.network_t[t])
    right_weight, right_x0, right_eps, right_entropy = brute_force(images, num_levels, s[t], x_t)
    np.testing.assert_allclose(weight[:, :100], right_weight, rtol=0, atol=1e-5)
    assert np.all(np.asarray(weight[:, 100:]) == 0)
    np.testing.assert_allclose(posterior.x0_mean.reshape(1000, -1), right_x0, rtol=0, atol=1e-5)
    noise = np.asarray(s.sqrt_one_minus_alpha_bar)[1:, None]
    assert np.all(np.abs(eps.reshape(1000, -1) - right_eps) < np.maximum(1e-5, ROUNDINGS / noise))
    np.testing.assert_allclose(posterior.entropy_nats, right_entropy, rtol=0, atol=1e-5)
    # So that this says something: twins leave x_t undecided at many t, and the last x_t leaves everything open.
    assert np.sum(np.abs(right_entropy - np.log(2)) < 0.3) > 50 and right_entropy[-1] > np.log(90)


def test_the_textbook_expansion_would_not_do():
    """‖x_t‖² − 2√ᾱ x_t·x_0 + ᾱ‖x_0‖² in float32 has lost at t = 1 what tells twins apart."""
    s, images = schedules.linear(1000), twins(256, (16, 16, 3))
    t = np.full(50, 1)
    x_t = latents(s, images, 256, t)
    x0, x = unit(images, 256).astype(np.float32).reshape(100, -1), np.asarray(x_t).reshape(50, -1)
    signal, noise = np.asarray(s.sqrt_alpha_bar[1]), np.asarray(s.sqrt_one_minus_alpha_bar[1])
    distance = np.sum(x**2, axis=1)[:, None] - 2 * signal * x @ x0.T + signal**2 * np.sum(x0**2, axis=1)
    naive = np.asarray(jax.nn.softmax(-distance / (2 * noise**2), axis=1))
    right = brute_force(images, 256, s[t], x_t)[0]
    exact = np.asarray(empirical.weights(empirical.in_blocks(images, 256, 100), s[t], x_t))
    assert np.abs(exact - right).max() < 1e-5 < 1e-3 < np.abs(naive - right).max()


def test_block_size_does_not_matter():
    s, images = schedules.linear(100), twins(256, (4, 4, 3))
    t = np.array([1, 2, 5, 20, 60, 100])
    x_t = latents(s, images, 256, t)
    posterior = jax.jit(empirical.posterior)
    one_block = posterior(empirical.in_blocks(images, 256, 100), s[t], x_t)
    for size in (1, 7, 300):
        data = empirical.in_blocks(images, 256, size)
        assert data.is_real.size % size == 0 and data.is_real.sum() == 100
        other = posterior(data, s[t], x_t)
        np.testing.assert_allclose(other.x0_mean, one_block.x0_mean, rtol=0, atol=1e-6)
        np.testing.assert_allclose(other.entropy_nats, one_block.entropy_nats, rtol=0, atol=2e-6)


def test_it_is_an_argument_of_a_program_that_all_devices_run():
    """As a part of a model; data of the same shape need no second compilation."""
    s, images = schedules.linear(100), twins(256, (4, 4, 3))
    p = reverse.make("eps", "fixed_small")
    t = np.array([1, 2, 5, 20, 60, 100])
    x_t = latents(s, images, 256, t)
    right_eps = brute_force(images, 256, s[t], x_t)[2].reshape(x_t.shape)
    num_traces = 0

    def denoise(model, items):
        nonlocal num_traces
        num_traces += 1
        return model.denoise(*items)

    batches = devices.over_batches(denoise)
    assert jax.local_device_count() > 1
    for data in (images, images[::-1]):  # whose order does not matter
        denoiser = empirical.denoiser(empirical.in_blocks(data, 256, 16), s, p)
        model = devices.replicate(Model(denoiser, p, s, num_levels=256))
        items = (np.asarray(x_t), np.asarray(s.network_t[t]))
        eps = np.concatenate([found for _, found in batches(model, items, 6)])
        # As in the comparison with brute force above: float32 holds no more of ε.
        noise = np.asarray(s.sqrt_one_minus_alpha_bar)[t, None, None, None]
        assert np.all(np.abs(eps - right_eps) < np.maximum(1e-5, ROUNDINGS / noise))
    assert num_traces == 1


def test_from_one_image_to_all_of_them():
    """x_t is the image itself near t = 0; where nothing of x_0 is left (ᾱ_T = 0) all images are as likely."""
    s, images = schedules.harmonic(1000), np.random.default_rng(0).integers(0, 256, (60, 4, 4, 3)).astype(np.uint8)
    t = np.array([1, 300, 700, 900, 1000])
    data = empirical.in_blocks(images, 256, 16)
    weight, posterior = posterior_of(data, s[t], latents(s, images, 256, t))
    np.testing.assert_allclose(np.exp(posterior.entropy_nats)[np.array([0, 4])], [1, 60], rtol=1e-5)
    np.testing.assert_allclose(weight[4, :60], 1 / 60, rtol=1e-5)
    np.testing.assert_allclose(posterior.x0_mean[4], unit(images, 256).mean(axis=0), atol=1e-6)


def test_its_training_loss_is_the_least_at_every_t():
    """L_simple's expectation over x_0 given x_t, in float64: any other function pays its squared distance on top."""
    s, images = schedules.linear(50), np.random.default_rng(1).integers(0, 17, (40, 4, 4, 1)).astype(np.uint8)
    t = np.repeat(np.arange(1, 51), 20)
    x_t = latents(s, images, 17, t)
    p = reverse.make("eps", "fixed_small")
    exact = empirical.denoiser(empirical.in_blocks(images, 17, 40), s, p)(x_t, s.network_t[t])
    exact = np.asarray(exact, np.float64).reshape(len(t), -1)

    weight = brute_force(images, 17, s[t], x_t)[0]
    x, x0 = np.asarray(x_t, np.float64).reshape(len(t), -1), unit(images, 17).reshape(40, -1)
    signal, noise = (np.asarray(a, np.float64)[t][:, None] for a in (s.sqrt_alpha_bar, s.sqrt_one_minus_alpha_bar))
    targets = (x[:, None] - signal[..., None] * x0) / noise[..., None]  # the ε that each image would mean

    def loss(eps_hat):
        per_image = np.mean((targets - eps_hat[:, None]) ** 2, axis=2)
        return np.sum(weight * per_image, axis=1).reshape(50, 20).mean(axis=1)

    rng = np.random.default_rng(2)
    centred = x - signal * x0.mean(axis=0)
    covariance = np.cov(x0.T, bias=True) * signal[:, :, None] ** 2 + np.eye(16) * noise[:, :, None] ** 2
    others = {
        "the best linear function": noise * np.linalg.solve(covariance, centred[..., None])[..., 0],
        "the likeliest image": np.take_along_axis(targets, weight.argmax(axis=1)[:, None, None], axis=1)[:, 0],
        "shrunk": 0.99 * exact,
        "disturbed": exact + 0.01 * rng.standard_normal(exact.shape),
    }
    for name, eps_hat in others.items():
        price = np.mean((eps_hat - exact) ** 2, axis=1).reshape(50, 20).mean(axis=1)
        assert np.all(loss(exact) <= loss(eps_hat) + 1e-9), name
        np.testing.assert_allclose(loss(eps_hat) - loss(exact), price, rtol=1e-3, atol=1e-7, err_msg=name)
    assert np.all(loss(others["disturbed"]) > loss(exact)) and np.any(loss(others["the best linear function"]) > 0.1)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_sampling_with_it_ends_on_training_images(prediction):
    s, images = schedules.cosine(50), np.random.default_rng(3).integers(0, 17, (30, 4, 4, 1)).astype(np.uint8)
    p = reverse.make(prediction, "fixed_small")
    keys = jax.random.split(jax.random.key(0), 24)

    @jax.jit
    def draw(data):
        x0, _ = samplers.sample(samplers.ancestral(), empirical.denoiser(data, s, p), p, s, keys, (4, 4, 1))
        return to_levels(x0, 17)

    samples = np.asarray(draw(empirical.in_blocks(images, 17, 8)))
    hits = [np.flatnonzero(np.all(images == sample, axis=(1, 2, 3))) for sample in samples]
    assert all(len(hit) == 1 for hit in hits)
    assert len({int(hit[0]) for hit in hits}) > 8  # and on many of them, not on one


def test_mistakes_are_one_sentence():
    with pytest.raises(ValueError, match="0 images cannot be cut into blocks of 4"):
        empirical.in_blocks(np.zeros((0, 4, 4, 1), np.uint8), 256, 4)
    with pytest.raises(ValueError, match="64×64×3 and 256 pixel values do not fit into 32 bits; at most 3276 numbers"):
        empirical.in_blocks(np.zeros((1, 64, 64, 3), np.uint8), 256, 4)
