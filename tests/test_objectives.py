"""Losses: their means over t, what they train, and their weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from diffusion import likelihood, objectives, process, reverse, schedules

S = schedules.cosine(40)
ROWS = S[1:]
SNR = np.exp(np.asarray(ROWS.log_snr, np.float64))
X0 = jnp.round(jax.random.uniform(jax.random.key(0), (4, 4, 1), minval=-1.0) * 8) / 8
EPS = jax.random.normal(jax.random.key(1), X0.shape)


def make(name, p, weighting=None, **arguments):
    return objectives.make(name, p, S.num_steps, 17, weighting, **arguments)


@pytest.mark.parametrize("prediction", list(reverse.PREDICTIONS))
def test_simple_vanishes_for_a_perfect_network_only(prediction):
    p = reverse.make(prediction, "fixed_small")
    simple, x_t = make("simple", p), process.q_sample(S[9], X0, EPS)
    perfect = p.target(S[9], X0, x_t, EPS)
    assert simple(S[9], X0, x_t, EPS, perfect)[0] == 0
    np.testing.assert_allclose(simple(S[9], X0, x_t, EPS, perfect + 0.5)[0], 0.25, rtol=1e-5)


def test_vlb_averages_over_t_to_the_bound():
    p = reverse.make("eps", "learned_range")
    x_t = jax.vmap(lambda row: process.q_sample(row, X0, EPS))(ROWS)
    output = jnp.concatenate([0.7 * x_t, jnp.zeros_like(x_t)], axis=-1)
    vlb = make("vlb", p)

    def term(row, x_t, output):
        return likelihood.vlb_term_bpd(p, row, X0, x_t, output, 17, clip_x0=False)

    losses = jax.vmap(lambda row, x_t, output: vlb(row, X0, x_t, EPS, output)[0])(ROWS, x_t, output)
    np.testing.assert_allclose(losses.mean(), jax.vmap(term)(ROWS, x_t, output).sum(), rtol=1e-5)


@pytest.mark.parametrize("arguments", [{}, {"vlb_weight": 0.5}], ids=["default", "0.5"])
def test_hybrid_lets_the_bound_train_the_variance_only(arguments):
    p, x_t = reverse.make("eps", "learned_range"), process.q_sample(S[9], X0, EPS)
    output = jax.random.normal(jax.random.key(3), (4, 4, 2))

    def gradient(objective):
        return jax.grad(lambda output: objective(S[9], X0, x_t, EPS, output)[0])(output)

    vlb_weight = arguments.get("vlb_weight", 0.001)  # Nichol & Dhariwal (2021), eq. 16
    hybrid = gradient(make("hybrid", p, **arguments))
    np.testing.assert_allclose(hybrid[..., :1], gradient(make("simple", p))[..., :1], rtol=1e-6)
    np.testing.assert_allclose(hybrid[..., 1:], vlb_weight * gradient(make("vlb", p))[..., 1:], rtol=1e-5)


# Choi et al. (2022), eq. 8 with k = 1, and Hang et al. (2023), section 3.4, in terms of the SNR.
CLOSED_FORMS = {
    ("p2", "eps"): lambda snr, gamma: (1 + snr) ** -gamma,
    ("p2", "x0"): lambda snr, gamma: snr * (1 + snr) ** -gamma,
    ("p2", "v"): lambda snr, gamma: snr * (1 + snr) ** (-gamma - 1),
    ("min_snr", "eps"): lambda snr, gamma: np.minimum(snr, gamma) / snr,
    ("min_snr", "x0"): np.minimum,
    ("min_snr", "v"): lambda snr, gamma: np.minimum(snr, gamma) / (snr + 1),
}
DEFAULT_GAMMA = {"p2": 1.0, "min_snr": 5.0}


@pytest.mark.parametrize("gamma", [None, 0.5, 2.0])
@pytest.mark.parametrize(("name", "prediction"), CLOSED_FORMS)
def test_weights_follow_their_formulas(name, prediction, gamma):
    p, arguments = reverse.make(prediction, "fixed_small"), {} if gamma is None else {"gamma": gamma}
    weight = jax.vmap(objectives.WEIGHTINGS[name](p, **arguments))(ROWS)
    wanted = CLOSED_FORMS[name, prediction](SNR, gamma or DEFAULT_GAMMA[name])
    np.testing.assert_allclose(weight, wanted, rtol=1e-5)


@pytest.mark.parametrize("prediction", list(reverse.PREDICTIONS))
def test_weights_in_their_limits(prediction):
    """γ = 0 makes P2 the loss of ε, whose error is √SNR times that of x̂_0, and γ = ∞ makes min-SNR the same."""
    p = reverse.make(prediction, "fixed_small")
    slope_squared = {
        "eps": 1 / SNR,
        "x0": np.ones(40),
        "v": 1 / (1 + SNR),
        "edm": 0.25 / (1 + 0.25 * SNR),  # c_out² of Karras et al. (2022), table 1, at σ_data = ½
        "velocity": (1 + np.sqrt(SNR)) ** -2,
        "mean": np.asarray(ROWS.posterior_x0, np.float64) ** -2,
    }
    wanted = SNR * slope_squared[prediction]
    np.testing.assert_allclose(jax.vmap(objectives.p2(p, gamma=0.0))(ROWS), wanted, rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(objectives.min_snr(p, gamma=1e30))(ROWS), wanted, rtol=1e-5)
    np.testing.assert_array_equal(jax.vmap(objectives.unweighted(p))(ROWS), np.ones(40, np.float32))


@pytest.mark.parametrize("name", DEFAULT_GAMMA)
def test_weights_are_finite_at_every_snr_and_vanish_without_signal(name):
    for prediction in reverse.PREDICTIONS:
        weight = objectives.WEIGHTINGS[name](reverse.make(prediction, "fixed_small"))
        for s in (schedules.linear(1000), schedules.cosine(1000)):
            assert np.isfinite(jax.vmap(weight)(s[1:])).all(), prediction
        if prediction != "eps":  # which cannot be predicted at ᾱ_T = 0
            assert weight(schedules.harmonic(10)[10]) == 0, prediction


def sigmoid_weights(schedule, k=2.0, prediction="eps"):
    weighting = objectives.sigmoid(reverse.make(prediction, "fixed_small"), k)
    return np.asarray(jax.vmap(weighting)(schedule[1:]), np.float64)


@pytest.mark.parametrize("k", [2.0, -1.0])
def test_the_sigmoid_weight_of_a_step_is_its_share_of_the_integral(k):
    """Kingma & Gao (2023): w falls with λ, so its mean over a step lies between its values at the step's ends."""
    for schedule in (schedules.linear(1000), schedules.cosine(40), schedules.rectified_flow(40, last=0.99)):
        weight = sigmoid_weights(schedule, k)
        log_snr = np.asarray(schedule.log_snr, np.float64)[1:]
        np.testing.assert_allclose(weight.sum(), np.logaddexp(0, k - log_snr[-1]), rtol=1e-5)
        w, step = expit(k - log_snr), np.asarray(jax.vmap(process.gamma_step)(schedule[2:]), np.float64)
        assert (w[:-1] * (1 - 1e-5) < weight[1:] / step).all() and (weight[1:] / step < w[1:] * (1 + 1e-5)).all()


def test_the_sigmoid_loss_depends_on_no_schedule():
    """Gaussian data of variance s²: E(ε − ε̂)² = s² SNR/(1 + s² SNR), and ½ ∫ w(λ) E(ε − ε̂)² dλ by quadrature."""
    variance, k = 0.3, 1.5
    for schedule in (schedules.linear(1000), schedules.rectified_flow(1000, last=0.99)):
        log_snr = np.asarray(schedule.log_snr, np.float64)[1:]
        found = 0.5 * np.sum(sigmoid_weights(schedule, k) * expit(log_snr + np.log(variance)))
        points = np.linspace(log_snr[-1], 40, 100_001)
        integrand = expit(k - points) * expit(points + np.log(variance))
        np.testing.assert_allclose(found, 0.5 * np.trapezoid(integrand, points), rtol=0.01)


def test_the_sigmoid_weight_of_another_prediction_is_the_same_loss():
    eps_weight = sigmoid_weights(S)
    for prediction, slope_squared in (("x0", np.ones(40)), ("v", 1 / (1 + SNR)), ("velocity", (1 + SNR**0.5) ** -2)):
        weight = sigmoid_weights(S, prediction=prediction)
        np.testing.assert_allclose(weight, eps_weight * SNR * slope_squared, rtol=1e-4, err_msg=prediction)
        assert sigmoid_weights(schedules.harmonic(10), prediction=prediction)[-1] == 0


@pytest.mark.parametrize("objective", ["simple", "hybrid"])
@pytest.mark.parametrize("name", DEFAULT_GAMMA)
def test_a_weighted_loss_is_the_same_for_every_prediction(name, objective):
    """One x̂_0, said in the units of each prediction: its weighted loss is a loss of x̂_0."""
    x0_hat = 0.5 * X0 + 0.1
    raw_variance = 0.3 * jnp.ones_like(X0)
    variance = "learned_range" if objective == "hybrid" else "fixed_small"
    for t in (1, 10, 25, 40):
        row, x_t = S[t], process.q_sample(S[t], X0, EPS)
        eps_hat = (x_t - row.sqrt_alpha_bar * x0_hat) / row.sqrt_one_minus_alpha_bar
        losses = {}
        for prediction in reverse.PREDICTIONS:
            p = reverse.make(prediction, variance)
            output = p.target(row, x0_hat, x_t, eps_hat)
            if p.learns_variance:
                output = jnp.concatenate([output, raw_variance], axis=-1)
            losses[prediction] = make(objective, p, objectives.WEIGHTINGS[name](p))(row, X0, x_t, EPS, output)[0]
        if objective == "simple":
            wanted = CLOSED_FORMS[name, "x0"](SNR[t - 1], DEFAULT_GAMMA[name]) * jnp.mean((X0 - x0_hat) ** 2)
            np.testing.assert_allclose(losses["x0"], wanted, rtol=1e-5)
        for prediction, loss in losses.items():
            np.testing.assert_allclose(loss, losses["x0"], rtol=2e-4, err_msg=f"{prediction}, t={t}")


def test_a_weight_leaves_the_reported_error_alone():
    p, x_t = reverse.make("eps", "fixed_small"), process.q_sample(S[9], X0, EPS)
    loss, parts = make("simple", p, objectives.min_snr(p))(S[9], X0, x_t, EPS, 0.9 * EPS)
    np.testing.assert_allclose(parts["mse"], 0.01 * jnp.mean(EPS**2), rtol=1e-4)
    np.testing.assert_allclose(loss, parts["mse"] * objectives.min_snr(p)(S[9]), rtol=1e-6)


def test_an_argument_out_of_its_range_is_refused_by_its_config_key():
    p = reverse.make("eps", "learned_range")
    with pytest.raises(ValueError, match="objective.weighting: gamma=0.0 of min_snr must be above 0"):
        objectives.min_snr(p, gamma=0.0)
    with pytest.raises(ValueError, match="objective.name: vlb_weight=-1.0 of hybrid must be at least 0"):
        make("hybrid", p, vlb_weight=-1.0)
