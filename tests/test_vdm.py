"""The losses of Kingma et al. (2021, VDM) against their formulas in float64, and the limit T → ∞.

Symbols of their code: z_t = α_t x + σ_t ε with σ_t² = sigmoid(γ_t), and u in [0, 1] for time. Its T is one less than
ours, whose x_1 is its z_0.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from scipy.special import log_softmax

from diffusion import (
    conditioning,
    gaussian,
    learned_schedule,
    likelihood,
    objectives,
    process,
    reverse,
    schedules,
    timesteps,
)
from diffusion.runtime import randomness
from diffusion.training import schedule as trained_schedule
from diffusion.training import step
from diffusion.training.step import Examples, Training

LEVELS, SHAPE, BATCH = 17, (4, 4, 2), 6
OWN = {"gamma_1": jnp.float32(-7.0), "log_range": jnp.log(12.0), "logits": jnp.sin(jnp.arange(9.0))}
LOW, HIGH = -7.5, 4.0  # by which γ is rescaled for the network


class Toy(nn.Module):
    """ε̂ = tanh(½ z + γ') with γ' in [0, 1]: what NumPy can do, too."""

    @nn.compact
    def __call__(self, x, network_t, dropout_keys=None):
        return jnp.tanh(0.5 * x + network_t[:, None, None, None] / 1000)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def vdm_gamma(own, u):
    """γ(u) and γ'(u): piecewise linear, the pieces in proportion to a softmax mixed with 1% of even ones."""
    logits = np.float64(own["logits"])
    share = np.exp(logits - logits.max())
    share = 0.99 * share / share.sum() + 0.01 / len(share)
    steps = np.exp(np.float64(own["log_range"])) * share
    knots = np.float64(own["gamma_1"]) + np.concatenate([[0.0], np.cumsum(steps)])
    piece = np.clip(np.ceil(u * len(steps)).astype(int) - 1, 0, len(steps) - 1)
    return np.interp(u * len(steps), np.arange(len(knots)), knots), len(steps) * steps[piece]


def vdm_loss_bpd(own, x, eps, eps_0, u, num_terms):
    """VDM's loss of each image: num_terms = 0 is continuous time. A transcription of the paper's section 3 to 5.

    Returns the diffusion loss (eqs. 14 and 17), the decoder's and the prior's, in bits/dim.
    """
    ends, _ = vdm_gamma(own, np.array([0.0, 1.0]))
    gamma, slope = vdm_gamma(own, u)
    z = np.sqrt(sigmoid(-gamma))[:, None, None, None] * x + np.sqrt(sigmoid(gamma))[:, None, None, None] * eps
    eps_hat = np.tanh(0.5 * z + ((gamma - LOW) / (HIGH - LOW))[:, None, None, None])
    squared = ((eps - eps_hat) ** 2).mean(axis=(1, 2, 3))
    if num_terms:
        before, _ = vdm_gamma(own, u - 1 / num_terms)
        diffusion = 0.5 * num_terms * np.expm1(gamma - before) * squared
    else:
        diffusion = 0.5 * slope * squared
    levels = np.linspace(-1, 1, LEVELS)
    z_0 = x + np.exp(0.5 * ends[0]) * eps_0
    logits = -0.5 * (z_0[..., None] - levels) ** 2 / np.exp(ends[0])
    chosen = np.argmin(np.abs(x[..., None] - levels), axis=-1)[..., None]
    decoder = -np.take_along_axis(log_softmax(logits, axis=-1), chosen, axis=-1).mean(axis=(1, 2, 3, 4))
    var_1 = sigmoid(ends[1])
    prior = 0.5 * ((1 - var_1) * x**2 + var_1 - np.log(var_1) - 1).mean(axis=(1, 2, 3))
    return np.stack([diffusion, decoder, prior]) / np.log(2)


def training(times, inner):
    p = reverse.make("eps", "fixed_small", "bayes")
    num_steps = len(OWN["logits"]) + 1

    def schedule_of(params):
        return conditioning.on_gamma(learned_schedule.of_params(params), LOW, HIGH)

    return Training(
        network=Toy(),
        objective=objectives.make("vdm", p, num_steps, LEVELS),
        timesteps=timesteps.TIMES[times](timesteps.low_discrepancy()),
        schedule=trained_schedule.make(schedule_of, inner, times),
        optimizer=optax.identity(),
        ema_decay=0.9,
        num_levels=LEVELS,
        batch_size=BATCH,
        flip=False,
        log_every=1,
    )


KEYS = jax.random.split(jax.random.key(1), BATCH)
X0 = jax.random.randint(jax.random.key(2), (BATCH, *SHAPE), 0, LEVELS) / 8 - 1
# The noise that the step draws from these keys.
EPS = jax.vmap(lambda key: jax.random.normal(key, SHAPE))(randomness.of_example(KEYS).noise)
EPS_0 = jax.vmap(lambda key: jax.random.normal(randomness.decoder_noise(key), SHAPE))(KEYS)
REAL_T = jnp.array([1.02, 2.5, 4.0, 6.3, 8.99, 9.7])
WHOLE_T = jnp.array([2, 3, 5, 7, 9, 10])


def examples(t):
    return Examples(X0, None, t, jnp.ones(BATCH), KEYS)


@pytest.mark.parametrize(("times", "t", "num_terms"), [("kl_terms", WHOLE_T, 9), ("continuous", REAL_T, 0)])
def test_the_loss_is_vdm_s_and_so_are_the_gradients_of_the_learned_ends(times, t, num_terms):
    """Also through what the network is told of γ: finite differences of the formulas in float64."""
    made = training(times, "fixed")

    @jax.jit
    def mean_loss(own):
        return step.mean_loss(made, {learned_schedule.SUBTREE: own}, examples(t))

    def reference(own):
        images = [np.float64(a) for a in (X0, EPS, EPS_0)]
        return vdm_loss_bpd(own, *images, (np.float64(t) - 1) / 9, num_terms)

    gradient, (means, losses) = jax.jit(jax.grad(mean_loss, has_aux=True))(OWN)
    wanted = reference(OWN)
    for name, term in zip(("kl_bpd", "decoder_bpd", "prior_bpd"), wanted, strict=True):
        # sqrt(1 − ᾱ_1) and the prior's difference are known to float32 only.
        np.testing.assert_allclose(means[name], term.mean(), rtol=5e-6, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(losses, wanted.sum(axis=0), rtol=3e-6)
    for name in ("gamma_1", "log_range"):
        moved = [reference(OWN | {name: np.float64(OWN[name]) + h}).sum(axis=0).mean() for h in (1e-5, -1e-5)]
        np.testing.assert_allclose(gradient[name], (moved[0] - moved[1]) / 2e-5, rtol=2e-4, atol=1e-6, err_msg=name)
    assert not gradient["logits"].any()


def test_the_inner_schedule_minimises_the_estimator_s_second_moment():
    """The logits' gradient is that of E[(½ γ' ‖ε − ε̂‖²)²], of the diffusion loss alone, in float64."""
    made = training("continuous", "second_moment")

    def mean_loss(own):
        return step.mean_loss(made, {learned_schedule.SUBTREE: own}, examples(REAL_T))[0]

    def second_moment(logits):
        images = [np.float64(a) for a in (X0, EPS, EPS_0)]
        own = OWN | {"logits": logits}
        return (vdm_loss_bpd(own, *images, (np.float64(REAL_T) - 1) / 9, 0)[0] ** 2).mean()

    gradient = jax.jit(jax.grad(mean_loss))(OWN)["logits"]
    logits = np.float64(OWN["logits"])
    moved = [[second_moment(logits + h * one) for h in (1e-5, -1e-5)] for one in np.eye(9)]
    np.testing.assert_allclose(gradient, (np.array(moved) @ [1, -1]) / 2e-5, rtol=1e-3, atol=1e-4)


def test_the_decoder_by_bayes_rule_is_the_posterior_of_equally_likely_values():
    row = schedules.linear_gamma(30, gamma_min=-4.0)[1]
    eps = jax.random.normal(jax.random.key(5), X0[0].shape)
    x_1 = process.q_sample(row, X0[0], eps)
    levels = np.linspace(-1, 1, LEVELS)
    joint = np.stack([gaussian.log_prob(process.q_marginal(row, jnp.full_like(x_1, level)), x_1) for level in levels])
    log_posterior = log_softmax(np.float64(joint), axis=0)
    index = np.round((np.asarray(X0[0]) + 1) * 8).astype(int)
    wanted = np.take_along_axis(log_posterior, index[None], axis=0)[0]
    p = reverse.make("v", "fixed_small", "bayes")
    p_prev, x0_hat = p(row, x_1, jnp.zeros_like(x_1), clip_x0=False)
    found = reverse.DECODERS["bayes"](p_prev, X0[0], LEVELS)
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    every = np.exp(np.moveaxis(log_posterior, 0, -1))
    np.testing.assert_allclose(p.level_probs(p_prev, LEVELS), every, rtol=1e-4, atol=1e-7)
    term = likelihood.vlb_term_bpd(p, row, X0[0], x_1, jnp.zeros_like(x_1), LEVELS)
    np.testing.assert_allclose(term, -wanted.mean() / np.log(2), rtol=1e-5)
    np.testing.assert_allclose(likelihood.bayes_decoder_bpd(row, X0[0], eps, LEVELS), term, rtol=1e-5)
    assert not np.allclose(x0_hat, p_prev.mean)  # x̂_0 is still the network's
    # For t > 1 it changes nothing.
    later = schedules.linear_gamma(30)[7]
    other = dataclasses.replace(p, decoder="network")
    np.testing.assert_array_equal(p(later, x_1, x_1)[0].mean, other(later, x_1, x_1)[0].mean)
    with pytest.raises(ValueError, match=r"model.decoder='bays' is not one of network, bayes"):
        reverse.make("v", "fixed_small", "bays")
