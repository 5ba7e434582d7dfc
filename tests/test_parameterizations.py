"""Each prediction's weighted error is the bound's KL: at every t, in closed form, and as in published code."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import gaussian, objectives, parameterizations, process, reverse, schedules

GOLDEN = Path(__file__).parent / "golden"
SCHEDULES = {
    "linear": schedules.linear(1000),
    "cosine": schedules.cosine(1000),
    "cosine of 50": schedules.cosine(50),
    "respaced": schedules.evenly_spaced(schedules.linear(1000), 50),
    "uneven": schedules.respace(schedules.cosine(1000), [1, 2, 10, 400, 401, 1000]),
}


def make(prediction, variance="fixed_small"):
    return reverse.make(prediction, variance)


def rows(name):
    return SCHEDULES[name][1:]


def float64_rows(name):
    """The tables in float64, with √ᾱ_t and √(1 − ᾱ_t) of one ᾱ_t: in float32 their squares add up to 1 ± 1e-7."""
    table = jax.tree.map(lambda table: table.astype(jnp.float64), rows(name))
    roots = {"sqrt_alpha_bar": table.alpha_bar**0.5, "sqrt_one_minus_alpha_bar": (1 - table.alpha_bar) ** 0.5}
    return dataclasses.replace(table, **roots)


def weights(name, prediction, variance="fixed_small"):
    """w_1…w_T in float64, as the library computes them in float32."""
    p = make(prediction, variance)
    return np.asarray(jax.vmap(lambda row: parameterizations.bound_weight(p, row))(rows(name)), np.float64)


def examples(table):
    """Every row with an x_0, an x_t, its ε, and an output that has nothing to do with them."""
    draws = np.random.default_rng(0).normal(size=(3, len(table.t), 2, 3, 1))
    x0, eps, output = (jnp.asarray(array, table.beta.dtype) for array in draws)
    return table, x0, jax.vmap(process.q_sample)(table, x0, eps), eps, output


def kl(p, row, x0, x_t, output):
    return gaussian.kl(process.q_posterior(row, x0, x_t), p(row, x_t, output, clip_x0=False).p_prev)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", reverse.PREDICTIONS)
def test_the_weighted_error_is_the_kl_at_every_t(name, prediction):
    p = make(prediction)
    with jax.enable_x64(True):
        table, x0, x_t, eps, output = examples(float64_rows(name))
        ours = jax.vmap(lambda *example: parameterizations.weighted_error(p, *example))(table, x0, x_t, eps, output)
        np.testing.assert_allclose(ours, jax.vmap(lambda *e: kl(p, *e))(table, x0, x_t, output), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_guess_costs_the_same_in_every_prediction(name):
    """An x̂_0, and the ε̂, v̂ and mean that stand for it: an error and a weight of each, one number."""
    with jax.enable_x64(True):
        table, x0, x_t, eps, x0_hat = examples(float64_rows(name))

        def loss(row, x0, x_t, eps, x0_hat, prediction):
            p = make(prediction)
            eps_hat = (x_t - row.sqrt_alpha_bar * x0_hat) / row.sqrt_one_minus_alpha_bar
            output = p.target(row, x0_hat, x_t, eps_hat)
            return parameterizations.weighted_error(p, row, x0, x_t, eps, output)

        losses = [
            jax.vmap(lambda *example: loss(*example, prediction))(table, x0, x_t, eps, x0_hat)  # noqa: B023
            for prediction in reverse.PREDICTIONS
        ]
        for other in losses[1:]:
            np.testing.assert_allclose(other, losses[0], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("prediction", reverse.PREDICTIONS)
def test_float32_keeps_its_digits_where_means_cancel(prediction):
    """Where one step changes little, the KL's two means agree to several digits; the weighted error subtracts none."""
    p = make(prediction)
    table, x0, x_t, eps, output = examples(rows("linear"))
    target = jax.vmap(p.target)(table, x0, x_t, eps)
    ours = jax.vmap(lambda *example: parameterizations.weighted_error(p, *example))(table, x0, x_t, eps, output)
    ours = np.asarray(ours, np.float64)
    exact = weights("linear", prediction)[:, None, None, None] * (np.float64(target) - np.float64(output)) ** 2
    far = np.abs(target - output) > 0.5  # where target and output do not themselves cancel
    np.testing.assert_allclose(ours[far], exact[far], rtol=2e-6)
    if prediction != "mean":
        naive = np.asarray(jax.vmap(lambda *e: kl(p, *e))(table, x0, x_t, output), np.float64)
        assert np.abs(naive[far] / exact[far] - 1).max() > 2e-5


def float64_process(name):
    """β, ᾱ, ᾱ of the step before and β̃ for t = 2…T, from published programs' β or from the paper's formula."""
    if name in ("linear", "cosine"):
        betas = np.load(GOLDEN / f"{name}_1000.npz")["betas"].astype(np.float64)
    else:
        f = np.cos((np.arange(51) / 50 + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    alpha_bar = np.cumprod(1 - betas)
    beta, now, before = betas[1:], alpha_bar[1:], alpha_bar[:-1]
    return beta, now, before, beta * (1 - before) / (1 - now)


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine of 50"])
def test_weights_are_differences_of_snr(name):
    _, now, before, beta_tilde = float64_process(name)
    snr, snr_before = now / (1 - now), before / (1 - before)
    closed = {
        "x0": (snr_before - snr) / 2,
        "eps": (snr_before / snr - 1) / 2,
        "v": (snr_before - snr) / (1 + snr) / 2,
        "velocity": (snr_before - snr) / (1 + np.sqrt(snr)) ** 2 / 2,
        "mean": 1 / (2 * beta_tilde),
    }
    for prediction, weight in closed.items():
        np.testing.assert_allclose(weights(name, prediction)[1:], weight, rtol=2e-6, err_msg=prediction)


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine of 50"])
def test_the_weight_of_eps_is_that_of_variational_diffusion_models(name):
    """½ expm1(γ_t − γ_{t−1}) with γ = −log SNR: Kingma et al. (2021), section 4."""
    _, now, before, _ = float64_process(name)
    gamma, gamma_before = np.log((1 - now) / now), np.log((1 - before) / before)
    np.testing.assert_allclose(weights(name, "eps")[1:], np.expm1(gamma - gamma_before) / 2, rtol=2e-6)


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine of 50"])
def test_the_weight_of_eps_is_equation_12(name):
    """β_t²/(2σ_t² α_t (1 − ᾱ_t)) of Ho et al. (2020), for both of their σ_t²."""
    beta, now, _, beta_tilde = float64_process(name)
    for variance, sigma_squared in (("fixed_small", beta_tilde), ("fixed_large", beta)):
        weight = beta**2 / (2 * sigma_squared * (1 - beta) * (1 - now))
        np.testing.assert_allclose(weights(name, "eps", variance)[1:], weight, rtol=2e-6, err_msg=variance)


@pytest.mark.parametrize("name", ["linear_1000", "cosine_1000", "linear_1000_respaced_50"])
@pytest.mark.parametrize(
    ("prediction", "variance"),
    [("eps", "fixed_small"), ("eps", "fixed_large"), ("x0", "fixed_small"), ("mean", "fixed_small")],
)
def test_published_programs_have_the_same_terms(name, prediction, variance):
    golden = dict(np.load(GOLDEN / f"{name}.npz"))
    schedule = getattr(schedules, name.split("_")[0])(1000)
    if "kept_timesteps" in golden:
        schedule = schedules.respace(schedule, golden["kept_timesteps"])
    row, p = schedule[jnp.asarray(golden["t"])], make(prediction, variance)

    def term_bpd(*example):
        return parameterizations.weighted_error(p, *example).mean() / math.log(2)

    ours = jax.vmap(term_bpd)(row, *(golden[key] for key in ("x0", "x_t", "eps", f"out_{prediction}")))
    if variance == "fixed_large":
        beta, beta_tilde = np.float64(row.beta), np.float64(row.beta_tilde)
        with np.errstate(divide="ignore", invalid="ignore"):  # β̃_1 = 0
            ours += (np.log(beta / beta_tilde) + beta_tilde / beta - 1) / 2 / math.log(2)
    is_kl = golden["t"] > 1
    want = golden[f"{prediction}/{variance}/noclip/vlb_bpd"]
    # Their KL is a float32 difference of means: see `test_golden`.
    np.testing.assert_allclose(ours[is_kl], want[is_kl], rtol=2e-4, atol=3e-7)


@pytest.mark.parametrize("prediction", reverse.PREDICTIONS)
def test_the_training_losses_are_one_another_times_the_weight(prediction):
    """objective.name="vlb", T L_{t−1} in bits/dim, is L_simple times T w_t/log 2 for t > 1, and so are gradients."""
    p = make(prediction)
    example = jax.tree.map(lambda leaf: leaf[jnp.asarray([1, 19, 49])], examples(rows("cosine of 50")))

    def loss_and_gradient(name):
        objective = objectives.make(name, p, num_steps=50)
        return jax.jit(jax.vmap(jax.value_and_grad(lambda *e: objective(*e)[0], argnums=4)))(*example)

    simple, vlb = loss_and_gradient("simple"), loss_and_gradient("vlb")
    weight = jax.vmap(lambda row: parameterizations.bound_weight(p, row))(example[0])
    for a, b in zip(vlb, simple, strict=True):
        factor = (50 / math.log(2) * weight).reshape(3, *[1] * (a.ndim - 1))
        np.testing.assert_allclose(a, factor * b, rtol=1e-3, atol=1e-5 * float(jnp.abs(a).max()))


SLOPES_SQUARED = {
    "eps": lambda snr: 1 / snr,
    "x0": np.ones_like,
    "v": lambda snr: 1 / (1 + snr),
    "edm": lambda snr: 0.25 / (1 + 0.25 * snr),
    "velocity": lambda snr: (1 + np.sqrt(snr)) ** -2,
}


@pytest.mark.parametrize("prediction", SLOPES_SQUARED)
def test_an_error_of_the_output_is_an_error_of_x0_by_the_snr(prediction):
    """(∂x̂_0/∂output)²: Salimans & Ho (2022), section 4."""
    table = rows("linear")
    slope = jax.vmap(lambda row: parameterizations.x0_per_output(make(prediction), row))(table)
    snr = np.exp(np.asarray(table.log_snr, np.float64))
    np.testing.assert_allclose(slope**2, SLOPES_SQUARED[prediction](snr), rtol=5e-6)


def test_without_signal_only_eps_has_no_weight():
    """ᾱ_T = 0: x_T says nothing of x_0, and an error of ε at T means any error of x_0."""
    row = schedules.harmonic(10)[10]
    weight = {name: float(parameterizations.bound_weight(make(name), row)) for name in reverse.PREDICTIONS}
    assert weight["eps"] == math.inf
    np.testing.assert_allclose([weight["x0"], weight["v"]], 0.5 * (0.1 / 0.9), rtol=1e-6)  # SNR_T = 0
    np.testing.assert_allclose(weight["mean"], 0.5 / 0.9, rtol=1e-6)


def test_a_learned_variance_has_no_weight_of_the_schedule():
    with pytest.raises(ValueError, match="variance='learned_range' depends on the network.*fixed_small, fixed_large"):
        parameterizations.bound_weight(make("eps", "learned_range"), SCHEDULES["linear"][5])


@pytest.mark.parametrize("prediction", reverse.PREDICTIONS)
@pytest.mark.parametrize("name", ["linear", "cosine", "cosine of 50"])
def test_leaving_out_the_weight_is_a_monotone_weighting_but_for_eps(name, prediction):
    """The factors of the bound's terms never fall as t grows, so that L_simple is a bound of data with noise."""
    factors = 1 / weights(name, prediction)[1:]
    is_monotone = bool(np.all(np.diff(factors) >= 0))
    assert is_monotone == (prediction != "eps")
