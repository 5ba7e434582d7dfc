"""Losses: their means over t, what they train, and how they are weighted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import likelihood, objectives, process, reverse, schedules

S = schedules.cosine(40)
X0 = jnp.round(jax.random.uniform(jax.random.key(0), (4, 4, 1), minval=-1.0) * 8) / 8
EPS = jax.random.normal(jax.random.key(1), X0.shape)


def problem(prediction, variance):
    return objectives.Problem(reverse.make(prediction, variance), S.num_steps, num_levels=17)


@pytest.mark.parametrize("prediction", list(reverse.PREDICTIONS))
def test_simple_vanishes_for_a_perfect_network_only(prediction):
    pr = problem(prediction, "fixed_small")
    x_t = process.q_sample(S[9], X0, EPS)
    perfect = pr.p.target(S[9], X0, x_t, EPS)
    assert objectives.simple(pr, S[9], X0, x_t, EPS, perfect)[0] == 0
    np.testing.assert_allclose(objectives.simple(pr, S[9], X0, x_t, EPS, perfect + 0.5)[0], 0.25, rtol=1e-5)


def test_vlb_averages_over_t_to_the_bound():
    pr = problem("eps", "learned_range")
    output = lambda x_t: jnp.concatenate([0.7 * x_t, jnp.zeros_like(x_t)], -1)  # noqa: E731
    x_t = jax.vmap(lambda row: process.q_sample(row, X0, EPS))(S[1:])
    one = lambda row, x_t: objectives.vlb(pr, row, X0, x_t, EPS, output(x_t))[0]  # noqa: E731
    term = lambda row, x_t: likelihood.vlb_term_bpd(pr.p, row, X0, x_t, output(x_t), 17, clip_x0=False)  # noqa: E731
    losses, terms = jax.vmap(one)(S[1:], x_t), jax.vmap(term)(S[1:], x_t)
    np.testing.assert_allclose(losses.mean(), terms.sum(), rtol=1e-5)


def test_hybrid_lets_the_bound_train_the_variance_only():
    pr = problem("eps", "learned_range")
    x_t = process.q_sample(S[9], X0, EPS)
    output = jax.random.normal(jax.random.key(3), (4, 4, 2))
    gradient = lambda objective: jax.grad(lambda out: objective(pr, S[9], X0, x_t, EPS, out)[0])(output)  # noqa: E731
    hybrid, simple, vlb = (gradient(f) for f in (objectives.hybrid, objectives.simple, objectives.vlb))
    np.testing.assert_allclose(hybrid[..., :1], simple[..., :1], rtol=1e-6)
    np.testing.assert_allclose(hybrid[..., 1:], 0.001 * vlb[..., 1:], rtol=1e-5)


WEIGHTS = {
    ("p2", "eps"): lambda snr: 1 / (1 + snr),
    ("min_snr", "eps"): lambda snr: np.minimum(snr, 5) / snr,
    ("min_snr", "x0"): lambda snr: np.minimum(snr, 5),
    ("min_snr", "v"): lambda snr: np.minimum(snr, 5) / (snr + 1),
}


@pytest.mark.parametrize(("name", "prediction"), WEIGHTS)
def test_weights_follow_their_formulas(name, prediction):
    snr = np.exp(np.asarray(S.log_snr[1:], np.float64))
    weight = objectives.WEIGHTINGS[name](S.log_snr[1:], prediction)
    np.testing.assert_allclose(weight, WEIGHTS[name, prediction](snr), rtol=1e-5)


@pytest.mark.parametrize("prediction", objectives.LOG_ERROR_RATIO)
def test_weights_in_their_limits(prediction):
    """γ = 0 makes P2 the loss of ε, γ = ∞ min-SNR as well; without signal every weight is finite."""
    log_snr, to_eps = S.log_snr[1:], S.log_snr[1:] - objectives.LOG_ERROR_RATIO[prediction](S.log_snr[1:])
    np.testing.assert_allclose(objectives.p2(log_snr, prediction, gamma=0.0), jnp.exp(to_eps), rtol=1e-5)
    np.testing.assert_allclose(objectives.min_snr(log_snr, prediction, gamma=1e30), jnp.exp(to_eps), rtol=1e-5)
    for weighting in objectives.WEIGHTINGS.values():
        assert jnp.isfinite(weighting(jnp.array([-60.0, 60.0]), prediction)).all()


@pytest.mark.parametrize("objective", [objectives.simple, objectives.hybrid])
@pytest.mark.parametrize("name", ["p2", "min_snr"])
def test_a_weighted_loss_is_the_same_for_every_prediction(name, objective):
    """One x̂_0, said in three ways: as ε̂, as itself and as v̂."""
    x0_hat = 0.5 * X0 + 0.1
    raw_variance = 0.3 * jnp.ones_like(X0)
    for t in (1, 10, 25, 40):
        row, x_t = S[t], process.q_sample(S[t], X0, EPS)
        eps_hat = (x_t - row.sqrt_alpha_bar * x0_hat) / row.sqrt_one_minus_alpha_bar
        v_hat = row.sqrt_alpha_bar * eps_hat - row.sqrt_one_minus_alpha_bar * x0_hat
        losses = []
        for prediction, output in (("eps", eps_hat), ("x0", x0_hat), ("v", v_hat)):
            is_hybrid = objective is objectives.hybrid
            p = reverse.make(prediction, "learned_range" if is_hybrid else "fixed_small")
            weighted = objectives.Problem(p, S.num_steps, 17, objectives.WEIGHTINGS[name])
            output = jnp.concatenate([output, raw_variance], -1) if is_hybrid else output
            losses.append(objective(weighted, row, X0, x_t, EPS, output)[0])
        np.testing.assert_allclose(losses, losses[1], rtol=2e-4)


def test_a_weight_leaves_the_reported_error_alone():
    x_t = process.q_sample(S[9], X0, EPS)
    weighted = objectives.Problem(reverse.make("eps", "fixed_small"), S.num_steps, 17, objectives.min_snr)
    loss, parts = objectives.simple(weighted, S[9], X0, x_t, EPS, 0.9 * EPS)
    np.testing.assert_allclose(parts["mse"], 0.01 * jnp.mean(EPS**2), rtol=1e-4)
    np.testing.assert_allclose(loss, parts["mse"] * objectives.min_snr(S[9].log_snr, "eps"), rtol=1e-6)
