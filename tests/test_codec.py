"""The codec: lossless under any model and either decoder, with the length of the bound."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import log_softmax

from diffusion import conditioning, reverse, schedules
from diffusion.codec import Codec, Message, grid
from diffusion.exact import oracles
from diffusion.model import Model

SHAPE = (4, 4, 2)
WRONG = {"nothing": 0.0, "all black": -1.0, "far outside": 50.0}


def normal_images(n, std=0.25):
    """256 levels, which are N(0.1, std²) in [-1, 1] but for the rounding."""
    x = np.random.default_rng(0).normal(0.1, std, (n, *SHAPE))
    return np.clip(np.rint((x + 1) * 127.5), 0, 255).astype(np.uint8)


def exact_model(num_steps, make=schedules.cosine, std=0.25, decoder="network"):
    data = oracles.normal(jnp.full(SHAPE, 0.1), jnp.full(SHAPE, std))
    p, schedule = reverse.make("x0", "learned", decoder), make(num_steps)
    return Model(data.denoiser(p, schedule), p, schedule)


LONG = pytest.param(1000, schedules.linear, marks=pytest.mark.slow)


@pytest.mark.parametrize(("num_steps", "make"), [(40, schedules.cosine), LONG])
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


def test_with_the_decoder_by_bayes_rule_the_code_is_as_long_as_its_formula():
    """The exact denoiser, told γ, leaves log q(x_1 | x_0) − log p(x_1) − log p(x_0 | x_1), here in float64."""

    def told_gamma(num_steps):
        schedule = schedules.linear_gamma(num_steps, gamma_min=-6.0)
        return conditioning.on_gamma(schedule, -6.5, 5.5)  # ends that were learned are others than at first

    images, model = normal_images(100), exact_model(40, told_gamma, decoder="bayes")
    codec = Codec(model, SHAPE, 100, precision=3)
    message = codec.encode(images)
    np.testing.assert_array_equal(codec.decode(message, 100), images)
    alpha_bar = 1 / (1 + math.exp(-6))
    levels, eps = np.linspace(-1, 1, 256), np.linspace(-6, 6, 101)
    x_1 = alpha_bar**0.5 * levels[:, None] + (1 - alpha_bar) ** 0.5 * eps  # of each pixel value and ε
    log_q = stats.norm.logpdf(x_1[..., None], alpha_bar**0.5 * levels, (1 - alpha_bar) ** 0.5)
    own = np.arange(256), slice(None), np.arange(256)
    log_p = stats.norm.logpdf(x_1, alpha_bar**0.5 * 0.1, (alpha_bar * 0.25**2 + 1 - alpha_bar) ** 0.5)
    nats = log_q[own] - log_p - log_softmax(log_q, axis=-1)[own]
    of_level = (nats * stats.norm.pdf(eps)).sum(-1) * (eps[1] - eps[0])
    net_bits = 32 * (len(message.words) - message.initial_words)
    # As above, and chance: each pixel pays for one ε.
    assert net_bits == pytest.approx(of_level[images].sum() / math.log(2), rel=0.01)


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize(
    ("variance", "decoder"), [("fixed_small", "network"), ("fixed_large", "network"), ("fixed_small", "bayes")]
)
def test_it_is_lossless_whatever_the_network_says(name, variance, decoder):
    p = reverse.make("eps", variance, decoder)
    model = Model(lambda x_t, t: jnp.full_like(x_t, WRONG[name]), p, schedules.linear(30))
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


def test_images_of_one_number_borrow_less_than_a_word():
    p, schedule = reverse.make("x0", "learned"), schedules.cosine(3)
    data = oracles.normal(jnp.zeros((1, 1, 1)), jnp.full((1, 1, 1), 0.5))
    codec = Codec(Model(data.denoiser(p, schedule), p, schedule, 17), (1, 1, 1), 16, precision=4)
    images = np.full((40, 1, 1, 1), 5, np.uint8)
    np.testing.assert_array_equal(codec.decode(codec.encode(images), 40), images)


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
