"""The learned schedule: its start, its laws for any parameters, and its gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import gaussian, learned_schedule, process, reverse, schedules

ENDLESS = ("harmonic", "rectified_flow")  # they end without signal
FIXED = {name: make for name, make in schedules.SCHEDULES.items() if name not in ENDLESS}
TABLES = jax.jit(learned_schedule.schedule)
X0 = jnp.linspace(-1, 1, 12, dtype=jnp.float32).reshape(2, 2, 3)


def random_params(seed, num_steps=40, spread=3.0):
    """Far from any schedule that a person would choose."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "gamma_1": -6.0 + spread * jax.random.normal(keys[0]),
        "log_range": 2.0 + 0.3 * spread * jax.random.normal(keys[1]),
        "logits": spread * jax.random.normal(keys[2], (num_steps - 1,)),
    }


@pytest.mark.parametrize("num_steps", [50, 1000])
@pytest.mark.parametrize("name", list(FIXED))
def test_it_starts_as_the_fixed_schedule(name, num_steps):
    start = FIXED[name](num_steps)
    learned = TABLES(learned_schedule.init(start))
    # γ itself is rounded to 1e-6 for |γ| ≤ 16, and 1 − ᾱ_t is about e^{γ_t} where t is small.
    for field in dataclasses.fields(start):
        wanted, found = getattr(start, field.name), getattr(learned, field.name)
        if wanted is not None:
            np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=3e-5, err_msg=field.name)
            assert found.dtype == wanted.dtype and found.shape == wanted.shape
    for name in ("beta", "beta_tilde", "posterior_x0", "posterior_x_t", "alpha_bar", "log_alpha"):
        np.testing.assert_allclose(getattr(learned, name), getattr(start, name), rtol=3e-5, err_msg=name)


@pytest.mark.parametrize("seed", range(5))
def test_its_laws_hold_for_any_parameters(seed):
    """γ increases, β lies in (0, 1), the tables agree with float64, steps compose and the posterior is Bayes' rule."""
    s = TABLES(random_params(seed))
    gamma = -np.asarray(s.log_snr[1:], np.float64)
    assert (np.diff(gamma) > 0).all()
    assert ((s.beta[1:] > 0) & (s.beta[1:] <= 1)).all()
    alpha_bar = np.concatenate([[1.0], 1 / (1 + np.exp(gamma))])
    noise = np.concatenate([[0.0], 1 / (1 + np.exp(-gamma))])
    alpha = alpha_bar[1:] / alpha_bar[:-1]
    np.testing.assert_allclose(s.alpha_bar, alpha_bar, rtol=1e-5)
    np.testing.assert_allclose(s.sqrt_one_minus_alpha_bar**2, noise, rtol=1e-5)
    np.testing.assert_allclose(np.exp(s.log_alpha[1:]), alpha, rtol=1e-5)
    # x_t from x_{t−1}: the variances add up to that of the marginal.
    np.testing.assert_allclose(alpha * noise[:-1] + s.beta[1:], noise[1:], rtol=1e-5)
    # Bayes: the precision of q(x_{t−1} | x_t, x_0) is the sum of those of q(x_t | x_{t−1}) and q(x_{t−1} | x_0).
    beta, prev = np.asarray(s.beta[2:], np.float64), noise[1:-1]
    np.testing.assert_allclose(1 / s.beta_tilde[2:], alpha[1:] / beta + 1 / prev, rtol=2e-5)
    np.testing.assert_allclose(s.posterior_x_t[2:], s.beta_tilde[2:] * np.sqrt(alpha[1:]) / beta, rtol=2e-5)
    np.testing.assert_allclose(s.posterior_x0[2:], s.beta_tilde[2:] * np.sqrt(alpha_bar[1:-1]) / prev, rtol=2e-5)
    for name in ("beta", "beta_tilde"):
        np.testing.assert_allclose(np.exp(getattr(s, f"log_{name}")[2:]), getattr(s, name)[2:], rtol=1e-5)
    assert s.log_beta_tilde[0] == s.log_beta_tilde[1] == s.log_beta_tilde[2] == s.log_beta_large[1]
    assert s.beta_tilde[1] == 0 and s.posterior_x0[1] == 1 and s.posterior_x_t[1] == 0
    assert s.alpha_bar[0] == 1 and s.beta[0] == 0 and s.posterior_x0[0] == 1


def test_logits_cannot_stop_the_clock():
    params = random_params(0) | {"logits": jnp.linspace(-300.0, 300.0, 39)}
    assert (np.diff(TABLES(params).log_snr[1:]) < 0).all()


def test_it_can_be_respaced():
    s = TABLES(random_params(1))
    short = schedules.respace(s, [1, 20, 40])
    np.testing.assert_allclose(short.log_snr[1:], s.log_snr[np.array([1, 20, 40])], rtol=1e-5)
    np.testing.assert_array_equal(short.network_t[1:], [0, 19, 39])


@pytest.mark.parametrize("name", list(FIXED))
def test_gamma_steps_are_differences_of_log_snr(name):
    s = FIXED[name](1000)
    betas = np.asarray(s.beta[1:], np.float64)
    log_alpha_bar = np.cumsum(np.log1p(-betas))
    log_snr = log_alpha_bar - np.log(-np.expm1(log_alpha_bar))
    steps = jax.vmap(process.gamma_step)(s)
    np.testing.assert_allclose(steps[2:], -np.diff(log_snr), rtol=3e-5)
    assert jnp.isinf(steps[:2]).all()


@pytest.mark.parametrize("t", [2, 3, 20, 40])
@pytest.mark.parametrize("name", ["linear", "cosine", "learned"])
def test_the_kl_is_a_distance_of_eps_weighted_by_gamma_alone(name, t):
    """VDM's discrete-time loss, against the KL between the posterior and p with the posterior's variance."""
    if name == "learned":
        s = TABLES(random_params(3, spread=1.0))
    else:
        s = schedules.SCHEDULES[name](40)
    row = s[t]
    eps, eps_hat = jax.random.normal(jax.random.key(t), (2, *X0.shape))
    x_t = process.q_sample(row, X0, eps)
    p, x0_hat = reverse.make("eps", "fixed_small")(row, x_t, eps_hat, clip_x0=False)
    kl = gaussian.kl(process.q_posterior(row, X0, x_t), p)
    # x_0 − x̂_0 is rounded to 1e-7, where its size for small t is that of √(1 − ᾱ_t).
    scale = float(jnp.max(kl))
    # ½ (e^{γ_t − γ_{t−1}} − 1) (ε − ε̂)²: Kingma et al. (2021, VDM), section 4.
    distance = 0.5 * jnp.expm1(process.gamma_step(row)) * (eps - eps_hat) ** 2
    np.testing.assert_allclose(distance, kl, rtol=1e-3, atol=1e-4 * scale)


def test_gradients_reach_every_parameter_and_are_right():
    """Against finite differences in the direction of each parameter, through every table at t = 1, 2 and T."""
    params = random_params(2, num_steps=8, spread=1.0)

    def total(params):
        s = learned_schedule.schedule(params)
        return sum(
            jnp.sum(jnp.tanh(table[jnp.array([1, 2, 8])])) for name, table in vars(s).items() if table is not None
            and jnp.issubdtype(table.dtype, jnp.floating) and name not in ("log_snr",)
        )  # fmt: skip

    gradient = jax.jit(jax.grad(total))(params)
    for name, leaf in params.items():
        assert jnp.isfinite(gradient[name]).all() and (gradient[name] != 0).all(), name
        direction = jnp.ones_like(leaf) if leaf.ndim == 0 else jnp.sin(jnp.arange(leaf.size, dtype=jnp.float32))
        moved = [jax.jit(total)(params | {name: leaf + h * direction}) for h in (1e-2, -1e-2)]
        np.testing.assert_allclose((moved[0] - moved[1]) / 2e-2, jnp.sum(gradient[name] * direction), rtol=1e-2)


def test_the_second_moment_trains_the_logits_by_the_squared_kl_terms_and_the_rest_by_the_losses():
    own, t = random_params(4, num_steps=6, spread=1.0), jnp.array([1, 3, 6, 3])
    params = {"weight": jnp.float32(0.7), learned_schedule.SUBTREE: own}

    def losses_of(params, row):
        return (params["weight"] * row.posterior_x_t - row.log_snr) ** 2 + row.beta, {"t": row.t}

    weight = jnp.array([1.0, 0.5, 2.0, 1.0])

    def mean(params, inner):
        def rows_of(params):
            return learned_schedule.of_params(params)[t]

        return jnp.mean(weight * learned_schedule.losses(losses_of, params, rows_of, inner)[0])

    def squares(params):
        values, _ = losses_of(params, learned_schedule.of_params(params)[t])
        return jnp.mean(jnp.where(t > 1, weight * values**2, 0.0))

    bound, found = (jax.jit(jax.grad(mean), static_argnums=1)(params, inner) for inner in ("bound", "second_moment"))
    of_squares = jax.jit(jax.grad(squares))(params)
    np.testing.assert_allclose(mean(params, "bound"), mean(params, "second_moment"), rtol=1e-6)
    np.testing.assert_allclose(found["weight"], bound["weight"], rtol=1e-6)
    fixed = jax.jit(jax.grad(mean), static_argnums=1)(params, "fixed")
    for gradient in (found, fixed):
        for name in ("gamma_1", "log_range"):
            np.testing.assert_allclose(gradient["schedule"][name], bound["schedule"][name], rtol=1e-5)
    assert not fixed["schedule"]["logits"].any() and fixed["weight"] == bound["weight"]
    np.testing.assert_allclose(found["schedule"]["logits"], of_squares["schedule"]["logits"], rtol=1e-4)
    assert not np.allclose(bound["schedule"]["logits"], of_squares["schedule"]["logits"], rtol=0.1)


def test_the_second_moment_by_its_older_name():
    assert learned_schedule.Learned(inner="variance") == learned_schedule.Learned(inner="second_moment")


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (schedules.cosine(1), "schedule.num_steps=1 must be at least 2"),
        (schedules.harmonic(10), r"cannot start where log SNR_T = −∞; choose another start \(schedule.name\)"),
        (schedules.from_betas([0.5, 1e-9, 0.5]), "no step below 0.01 of the mean"),
    ],
)
def test_a_start_that_it_cannot_have_is_refused_in_one_line(start, words):
    with pytest.raises(ValueError, match=words) as error:
        learned_schedule.init(start)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("learning_rate", [0.0, -1.0, 10.5])
def test_its_learning_rate_has_a_range(learning_rate):
    with pytest.raises(ValueError, match=r"schedule.name: learning_rate=.* of learned must be in \(0, 10\]"):
        learned_schedule.Learned(learning_rate=learning_rate)
