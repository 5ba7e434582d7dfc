"""Reference values from independent published code: guided-diffusion's Gaussian diffusion, in PyTorch.

Tolerances: means and variances agree to 2e-4 relative. That code subtracts exp(r) − 1 − r in float32, which
leaves an absolute noise of about 2e-7 bits/dim in their KL terms; `test_likelihood` compares ours with float64.
"""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import likelihood, objectives, process, reverse, samplers, schedules

KL_NOISE_BPD = 3e-7


def load(name):
    golden = dict(np.load(Path(__file__).parent / "golden" / f"{name}.npz"))
    s = {"linear_1000": schedules.linear, "cosine_1000": schedules.cosine}.get(name, schedules.linear)(1000)
    if "kept_timesteps" in golden:
        s = schedules.respace(s, golden["kept_timesteps"])
    return golden, s


@pytest.fixture(scope="module", params=["linear_1000", "cosine_1000", "linear_1000_respaced_50"])
def case(request):
    golden, s = load(request.param)
    return golden, s, s[jnp.asarray(golden["t"])]


def output_of(golden, prediction, variance):
    parts = [golden[f"out_{prediction}"]] + [golden["out_var"]] * (variance == "learned_range")
    return jnp.asarray(np.concatenate(parts, axis=-1))


def test_tables(case):
    golden, s, _ = case
    np.testing.assert_allclose(s.beta[1:], golden["betas"], rtol=1e-6)


def test_forward_process(case):
    golden, _, row = case
    x0, x_t = golden["x0"], golden["x_t"]
    np.testing.assert_allclose(jax.vmap(process.q_sample)(row, x0, golden["eps"]), x_t, rtol=1e-6, atol=1e-6)
    marginal = jax.vmap(process.q_marginal)(row, x0)
    np.testing.assert_allclose(marginal.mean, golden["marginal_mean"], rtol=1e-6)
    np.testing.assert_allclose(marginal.log_var, golden["marginal_log_variance"], rtol=1e-6, atol=1e-7)
    posterior = jax.vmap(process.q_posterior)(row, x0, x_t)
    np.testing.assert_allclose(posterior.mean, golden["posterior_mean"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(posterior.log_var, golden["posterior_log_variance_clipped"], rtol=1e-6)
    np.testing.assert_allclose(row.beta_tilde, golden["posterior_variance"][:, 0, 0, 0], rtol=1e-5)


def test_prior(case):
    golden, s, _ = case
    prior = jax.vmap(lambda x0: likelihood.prior_bpd(s, x0))(golden["x0"])
    np.testing.assert_allclose(prior, golden["prior_bpd"], rtol=1e-5, atol=1e-9)


PAIRS = [
    ("eps", "fixed_small"), ("eps", "fixed_large"), ("eps", "learned_range"),
    ("x0", "fixed_small"), ("mean", "fixed_small"),
]  # fmt: skip


@cache
def reverse_and_bounds(prediction, variance, clip_x0):
    """A compiled function of a batch: the reverse process, the bound's term, and the one with the published decoder."""
    p, decoder = reverse.make(prediction, variance), likelihood.PROTOCOLS["ho2020"].decoder

    def of_example(row, x0, x_t, output):
        example = p, row, x0, x_t, output
        ours = likelihood.vlb_term_bpd(*example, clip_x0=clip_x0)
        as_published = likelihood.vlb_term_bpd(*example, clip_x0=clip_x0, decoder=decoder)
        return p(row, x_t, output, clip_x0), ours, as_published

    return jax.jit(jax.vmap(of_example))


@pytest.mark.parametrize("clip", ["clip", "noclip"])
@pytest.mark.parametrize(("prediction", "variance"), PAIRS)
def test_reverse_process_and_bound(case, prediction, variance, clip):
    golden, _, row = case

    def want(key):
        return golden[f"{prediction}/{variance}/{clip}/{key}"]

    examples = (row, golden["x0"], golden["x_t"], output_of(golden, prediction, variance))
    (p_prev, x0_hat), bpd, as_published = reverse_and_bounds(prediction, variance, clip == "clip")(*examples)
    np.testing.assert_allclose(p_prev.mean, want("mean"), rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(p_prev.log_var, want("log_variance"), rtol=1e-6)
    # x̂_0 is a difference of float32 numbers of size 1, divided by √ᾱ_t (or by the coefficient of x_0 in the
    # mean) and clipped: its error is a few roundings over that divisor.
    divisor = {"eps": row.sqrt_alpha_bar, "mean": row.posterior_x0}.get(prediction, jnp.ones(len(row.t)))
    error = np.abs(x0_hat - want("x0")).max(axis=(1, 2, 3))
    assert (error <= 4 * 1.2e-7 * np.maximum(1.0, np.abs(want("x0")).max()) / divisor).all()

    is_kl = golden["t"] > 1
    np.testing.assert_allclose(bpd[is_kl], want("vlb_bpd")[is_kl], rtol=2e-4, atol=KL_NOISE_BPD)
    if prediction == "eps":
        # The references' decoder approximates the normal CDF by a tanh; ours is exact.
        np.testing.assert_allclose(bpd[~is_kl], want("vlb_bpd")[~is_kl], rtol=2e-3)
    np.testing.assert_allclose(as_published, want("vlb_bpd"), rtol=2e-4, atol=KL_NOISE_BPD)


@pytest.mark.parametrize("name", ["linear_1000", "cosine_1000"])
def test_training_losses(name):
    golden, s = load(name)
    row = s[jnp.asarray(golden["t"])]
    p = reverse.make("eps", "learned_range")
    arguments = (row, golden["x0"], golden["x_t"], golden["eps"], output_of(golden, "eps", "learned_range"))
    hybrid, parts = jax.vmap(objectives.make("hybrid", p, s.num_steps))(*arguments)
    vlb, _ = jax.vmap(objectives.make("vlb", p, s.num_steps))(*arguments)
    is_kl = golden["t"] > 1
    np.testing.assert_allclose(parts["mse"], golden["hybrid/mse"], rtol=1e-5)
    for ours, want, scale in ((hybrid, "hybrid/loss", 1), (vlb, "vlb_training/loss", 1000)):
        np.testing.assert_allclose(ours[is_kl], golden[want][is_kl], rtol=2e-4, atol=scale * KL_NOISE_BPD)
        np.testing.assert_allclose(ours[~is_kl], golden[want][~is_kl], rtol=2e-3)  # the decoder, as above


def test_ddim_step(case):
    golden, _, row = case
    p = reverse.make("eps", "fixed_small")
    _, x0_hat = jax.vmap(p)(row, golden["x_t"], golden["out_eps"])
    x_prev = jax.vmap(samplers.ddim_step)(row, golden["x_t"], x0_hat).mean
    np.testing.assert_allclose(x_prev, golden["ddim/eta0/clip/sample"], rtol=2e-4, atol=2e-6)
