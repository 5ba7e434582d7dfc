"""The reverse process: predictions convert into each other, and variances lie in their ranges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import continuous_time, process, reverse, schedules

SHAPE = (2, 3, 3)
X0, EPS = (jax.random.uniform(jax.random.key(i), SHAPE, minval=-1.0) for i in range(2))
S = schedules.linear(1000)


@pytest.mark.parametrize("t", [1, 2, 300, 1000])
@pytest.mark.parametrize("prediction", list(reverse.PREDICTIONS))
def test_a_perfect_prediction_gives_the_posterior(prediction, t):
    row = S[t]
    x_t = process.q_sample(row, X0, EPS)
    p = reverse.make(prediction, "fixed_small")
    p_prev, x0_hat = p(row, x_t, p.target(row, X0, x_t, EPS), clip_x0=False)
    posterior = process.q_posterior(row, X0, x_t)
    # 1/√ᾱ_T = 157, and 1/(coefficient of x_0) is larger still for the mean: roundings of 6e-8 grow by that.
    np.testing.assert_allclose(x0_hat, X0, atol=3e-4 if prediction == "mean" else 2e-5)
    np.testing.assert_allclose(p_prev.mean, posterior.mean, atol=1e-6)
    np.testing.assert_array_equal(p_prev.log_var, posterior.log_var)


@pytest.mark.parametrize("prediction", list(reverse.PREDICTIONS))
def test_a_perfect_prediction_gives_x0_where_the_first_step_shrinks_the_image(prediction):
    s = schedules.from_gamma(np.linspace(-5, 3, 30), np.arange(30), x0_scale=0.5)
    p = reverse.make(prediction, "fixed_small")
    for row in (s[1], s[20], *([] if prediction == "mean" else [continuous_time.at(s, jnp.float32(20.3))])):
        x_t = process.q_sample(row, X0, EPS)
        np.testing.assert_allclose(p.meaning.to_x0(row, x_t, p.target(row, X0, x_t, EPS)), X0, atol=2e-5)


@pytest.mark.parametrize("t", [2, 300, 1000])
def test_the_mean_from_eps_is_equation_11(t):
    row = S[t]
    mean = reverse.make("eps", "fixed_large")(row, X0, EPS, clip_x0=False)[0].mean
    by_hand = (X0 - row.beta / row.sqrt_one_minus_alpha_bar * EPS) / jnp.exp(0.5 * row.log_alpha)
    np.testing.assert_allclose(mean, by_hand, rtol=1e-5, atol=1e-6)


def test_learned_range_spans_the_two_fixed_variances():
    p = reverse.make("eps", "learned_range")
    for t in (1, 2, 500):
        ends = [p(S[t], X0, jnp.concatenate([EPS, jnp.full(SHAPE, raw)], -1))[0].log_var for raw in (-1.0, 1.0)]
        np.testing.assert_allclose(ends[0], jnp.full(SHAPE, S[t].log_beta_tilde), rtol=1e-6)
        # At t = 1 the upper end is log β_1 itself, and not fixed_large's log β̃_2.
        np.testing.assert_allclose(ends[1], jnp.full(SHAPE, S[t].log_beta), rtol=1e-6)
    large = reverse.make("eps", "fixed_large")(S[1], X0, EPS)[0].log_var
    np.testing.assert_array_equal(large, jnp.full(SHAPE, S.log_beta_tilde[2]))


def test_learned_is_the_log_variance_itself():
    raw = jnp.full(SHAPE, -2.5)
    np.testing.assert_array_equal(
        reverse.make("x0", "learned")(S[7], X0, jnp.concatenate([EPS, raw], -1))[0].log_var, raw
    )


def test_respaced_learned_range_uses_the_respaced_betas():
    short = schedules.respace(S, [1, 500, 1000])
    raw = jnp.concatenate([EPS, jnp.ones(SHAPE)], -1)
    log_var = reverse.make("eps", "learned_range")(short[2], X0, raw)[0].log_var
    np.testing.assert_allclose(jnp.exp(log_var), jnp.full(SHAPE, 1 - S.alpha_bar[500] / S.alpha_bar[1]), rtol=1e-5)


def test_clipping_moves_the_mean_unless_the_mean_is_predicted():
    for prediction, moves in (("eps", True), ("x0", True), ("v", True), ("mean", False)):
        p = reverse.make(prediction, "fixed_small")
        clipped, x0_clipped = p(S[500], 3 * X0, -3 * EPS, clip_x0=True)
        free, x0_free = p(S[500], 3 * X0, -3 * EPS, clip_x0=False)
        np.testing.assert_array_equal(x0_clipped, jnp.clip(x0_free, -1, 1))
        assert bool(jnp.any(clipped.mean != free.mean)) == moves


def test_batches_gradients_and_channels():
    p = reverse.make("v", "learned_range")
    assert (p.output_channels(3), reverse.make("v", "fixed_small").output_channels(3)) == (6, 3)
    output = jnp.concatenate([EPS, EPS], -1)

    def one(t):
        return jax.jit(p)(S[t], X0, output)[0].mean

    batch = jax.vmap(p, in_axes=(0, None, None))(S[jnp.asarray([3, 900])], X0, output)[0].mean
    np.testing.assert_allclose(batch, jnp.stack([one(3), one(900)]), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda out: sum(leaf.sum() for leaf in p(S[3], X0, out, False)[0]))(output)
    assert np.isfinite(gradient).all() and (gradient != 0).all()


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@pytest.mark.parametrize("t", [1, 300, 1000])
def test_edm_is_the_network_of_its_preconditioning(t, sigma_data):
    """Karras et al. (2022), eq. 7, table 1 and λ(σ) = 1/c_out², for x = x_0 + σ n in float64."""
    p = reverse.make("edm", "fixed_small", sigma_data=sigma_data)
    a, b = np.float64(S[t].sqrt_alpha_bar), np.float64(S[t].sqrt_one_minus_alpha_bar)
    x, sigma = np.float64(X0) + b / a * np.float64(EPS), b / a
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / np.sqrt(sigma**2 + sigma_data**2)
    x_t = process.q_sample(S[t], X0, EPS)
    f = jnp.flip(EPS)
    x0_hat = p(S[t], x_t, f, clip_x0=False).x0_hat
    np.testing.assert_allclose(x0_hat, c_skip * x + c_out * np.float64(f), rtol=1e-5, atol=1e-6)
    # The squared error of F is λ(σ) ‖D − x_0‖², so L_simple without a weight is their loss.
    error = np.float64(p.target(S[t], X0, x_t, EPS)) - np.float64(f)
    theirs = (np.float64(X0) - c_skip * x - c_out * np.float64(f)) / c_out
    np.testing.assert_allclose(error, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("t", [1, 300, 1000])
def test_edm_is_minus_v_for_data_of_variance_1(t):
    x_t = process.q_sample(S[t], X0, EPS)
    edm, v = reverse.make("edm", "fixed_small", sigma_data=1.0), reverse.make("v", "fixed_small")
    np.testing.assert_allclose(edm.target(S[t], X0, x_t, EPS), -v.target(S[t], X0, x_t, EPS), rtol=1e-6, atol=1e-6)
    x0_hat = v(S[t], x_t, -EPS, clip_x0=False).x0_hat
    np.testing.assert_allclose(edm(S[t], x_t, EPS, clip_x0=False).x0_hat, x0_hat, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sigma_data", [0.5, 1.7])
def test_edm_has_a_target_of_variance_1_at_every_t(sigma_data):
    """For data of the standard deviation σ_data: E F² is the sum of squares of its factors of x_0/σ_data and ε."""
    p = reverse.make("edm", "fixed_small", sigma_data=sigma_data)
    one, zero = jnp.ones(()), jnp.zeros(())
    of_x0 = jax.vmap(lambda row: p.target(row, sigma_data * one, zero, zero))(S[1:])
    of_eps = jax.vmap(lambda row: p.target(row, zero, zero, one))(S[1:])
    np.testing.assert_allclose(of_x0**2 + of_eps**2, 1, rtol=1e-6)


def test_an_argument_of_a_prediction_is_checked():
    assert reverse.make("edm", "fixed_small", sigma_data=1.0) != reverse.make("edm", "fixed_small")
    with pytest.raises(ValueError, match="model.prediction: sigma_data=0.0 of edm must be above 0"):
        reverse.make("edm", "fixed_small", sigma_data=0.0)


@pytest.mark.parametrize(
    ("prediction", "variance", "words"),
    [
        ("epsilon", "learned", "model.prediction='epsilon' is not one of eps"),
        ("eps", "large", "model.variance='large' is not one of fixed_small"),
    ],
)
def test_unknown_names_are_refused(prediction, variance, words):
    with pytest.raises(ValueError, match=words):
        reverse.make(prediction, variance)
