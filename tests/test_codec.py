"""The codec: lossless under any model, and as long as the bound."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion import reverse, schedules
from diffusion.codec import Codec, Message, grid
from diffusion.exact import oracles
from diffusion.model import Model

SHAPE = (4, 4, 2)
WRONG = {"nothing": 0.0, "all black": -1.0, "far outside": 50.0}


def normal_images(n, std=0.25):
    """256 levels, which are N(0.1, std²) in [-1, 1] but for the rounding."""
    x = np.random.default_rng(0).normal(0.1, std, (n, *SHAPE))
    return np.clip(np.rint((x + 1) * 127.5), 0, 255).astype(np.uint8)


def exact_model(num_steps, make=schedules.cosine, std=0.25):
    data = oracles.normal(jnp.full(SHAPE, 0.1), jnp.full(SHAPE, std))
    p, schedule = reverse.make("x0", "learned"), make(num_steps)
    return Model(data.denoiser(p, schedule), p, schedule)


@pytest.mark.parametrize(("num_steps", "make"), [(40, schedules.cosine), (1000, schedules.linear)])
def test_with_the_exact_denoiser_the_code_is_as_long_as_the_entropy_of_the_data(num_steps, make):
    """p_θ is the true reverse process, so every path x_1…x_T costs the same: −log p(x_0)."""
    images = normal_images(24)
    codec = Codec(exact_model(num_steps, make), SHAPE, 24, precision=3)
    message = codec.encode(images)
    np.testing.assert_array_equal(codec.decode(message, 24), images)
    edges = (np.arange(257) - 0.5) / 127.5 - 1
    entropy_bits = -np.log2(np.diff(stats.norm.cdf(edges, 0.1, 0.25)))[images].sum()
    net_bits = 32 * (len(message.words) - message.initial_words)
    # Words are whole, the groups' sizes take 2 bits each, and T·6e-7 bits/dim is the grid's.
    assert net_bits == pytest.approx(entropy_bits, rel=0.01)


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_it_is_lossless_whatever_the_network_says(name, variance):
    model = Model(lambda x_t, t: jnp.full_like(x_t, WRONG[name]), reverse.make("eps", variance), schedules.linear(30))
    images = np.random.default_rng(3).integers(0, 256, (5, *SHAPE)).astype(np.uint8)
    codec = Codec(model, SHAPE, 4, precision=3)
    np.testing.assert_array_equal(codec.decode(codec.encode(images), 5), images)


def test_a_learned_variance_may_be_anything():
    def denoise(x_t, t):
        return jnp.concatenate([x_t, 40 * jnp.sin(1e3 * x_t)], axis=-1)  # from e^−20 to e^20

    model = Model(denoise, reverse.make("mean", "learned"), schedules.cosine(8), 17)
    images = np.random.default_rng(3).integers(0, 17, (3, *SHAPE)).astype(np.uint8)
    codec = Codec(model, SHAPE, 3, precision=3)
    np.testing.assert_array_equal(codec.decode(codec.encode(images), 3), images)


@pytest.mark.parametrize("num_steps", [1, 2])
@pytest.mark.parametrize("num_images", [0, 1, 7])
def test_few_steps_few_images_and_no_noise_left(num_steps, num_images):
    model = exact_model(num_steps, schedules.harmonic)
    codec = Codec(model, SHAPE, 3, precision=3)
    message = codec.encode(normal_images(7)[:num_images])
    np.testing.assert_array_equal(codec.decode(message, num_images), normal_images(7)[:num_images])


def test_random_bits_are_few_and_do_not_matter():
    """What is on loan is H(x_t | x_0) of two images, and the stack itself has three words."""
    images, model = normal_images(40), exact_model(20)
    codec = Codec(model, SHAPE, 16, precision=3)
    one, other = codec.encode(images, seed=0), codec.encode(images, seed=1)
    steps = grid(jax.device_get(model.schedule), 3)
    loan = np.log2(math.sqrt(2 * math.pi * math.e) * steps.marginal_std[1:] / steps.spacing[1:]).max()
    assert 32 * one.initial_words < 1.2 * (2 * images[0].size * loan + 32 * 3)
    assert len(one.words) != 0 and (one.words[-4:] != other.words[-4:]).any()
    assert abs(len(one.words) - len(other.words)) <= 4
    sizes = []
    codec.encode(images, tick=sizes.append)
    assert sum(sizes) == 40 and sizes[0] == 2 and max(sizes) > 4


@pytest.mark.parametrize(("precision", "make"), [(3, schedules.linear), (10, schedules.cosine)])
def test_the_random_bits_suffice_for_one_large_image(precision, make):
    """One image of many pixels has no others whose bits it could take, and two latents on loan at once."""
    shape, p, schedule = (64, 64, 3), reverse.make("x0", "learned"), make(60)
    data = oracles.normal(jnp.full(shape, 0.1), jnp.full(shape, 0.25))
    codec = Codec(Model(data.denoiser(p, schedule), p, schedule), shape, 1, precision)
    image = np.random.default_rng(0).integers(0, 256, (1, *shape)).astype(np.uint8)
    np.testing.assert_array_equal(codec.decode(codec.encode(image), 1), image)


def test_each_latent_lies_on_a_grid_finer_than_both_of_its_gaussians():
    schedule = schedules.cosine(10)
    steps = grid(jax.device_get(schedule), 4)
    beta, beta_tilde = np.asarray(schedule.beta), np.asarray(schedule.beta_tilde)
    for t in range(1, 10):
        assert steps.spacing[t] == pytest.approx(min(beta[t], beta_tilde[t + 1]) ** 0.5 / 16, rel=1e-5)
    assert steps.spacing[10] == pytest.approx(beta[10] ** 0.5 / 16, rel=1e-5)


def test_other_bits_or_another_model_are_not_taken_for_images():
    images = normal_images(6)
    codec, message = Codec(exact_model(10), SHAPE, 4, precision=3), None
    message = codec.encode(images)
    with pytest.raises(ArithmeticError):
        codec.decode(Message(message.words, message.initial_words + 1), 6)
    with pytest.raises(ArithmeticError):
        codec.decode(Message(message.words[message.initial_words :], message.initial_words), 6)
    other = Codec(exact_model(10, std=0.26), SHAPE, 4, precision=3)
    assert other.fingerprint() != codec.fingerprint() == Codec(exact_model(10), SHAPE, 4, precision=3).fingerprint()


def test_what_cannot_be_coded_is_refused():
    p, schedule = reverse.make("eps", "fixed_small"), schedules.cosine(3)
    with pytest.raises(ValueError, match="takes labels"):
        Codec(Model(lambda x_t, t, labels: x_t, p, schedule, takes_labels=True), SHAPE, 2, precision=3)
    broken = Codec(Model(lambda x_t, t: x_t * jnp.nan, p, schedule), SHAPE, 2, precision=3)
    with pytest.raises(ArithmeticError, match="at t = 1 is NaN"):
        broken.encode(normal_images(1))
    bayes = Model(lambda x_t, t: x_t, reverse.make("x0", "fixed_small", decoder="bayes"), schedule)
    with pytest.raises(ValueError, match="model.decoder='bayes'"):
        Codec(bayes, SHAPE, 2, precision=3)
