"""The study's own quadratures against closed forms, and its commands on small inputs."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from ml_collections import config_dict

from diffusion import likelihood, reverse, schedules
from diffusion.exact import ode, oracles
from diffusion.experiment import workdir
from diffusion.model import Model
from diffusion.reporting import summary
from experiments import bound_tightness, tightness_capacity, tightness_known
from experiments.commands import exit_with


@pytest.fixture
def one_gaussian(monkeypatch):
    """The 1-D mixture replaced by N(0.3, 0.5²), whose gap has a closed form."""
    monkeypatch.setattr(tightness_known, "LINE", tuple(np.asarray([[value]]) for value in (1.0, 0.3, 0.25)))
    return oracles.normal(jnp.asarray([0.3]), jnp.asarray([0.5]))


@pytest.mark.parametrize("make", [schedules.cosine, schedules.harmonic])
def test_quadrature_equals_the_closed_form(one_gaussian, make):
    schedule = make(12)
    gaps = tightness_known.line_gaps(schedule)
    for variance in ("fixed_small", "fixed_large"):
        steps, prior = gaps[variance]
        closed = oracles.gaussian_gap_nats(one_gaussian, variance, schedule)
        np.testing.assert_allclose(steps, closed.mismatch[1:].sum(), rtol=1e-4)  # its decoder is the best one
        np.testing.assert_allclose(prior, closed.prior, rtol=1e-3, atol=1e-6)
    for variance in ("optimal", "exact"):
        np.testing.assert_allclose(gaps[variance][0], 0.0, atol=1e-9)


def test_the_model_s_error_is_part_of_the_gap():
    """KL(q(x_0) ‖ p(x_0)) ≤ KL(q(x_{0:T}) ‖ p(x_{0:T})), and a smaller variance error makes a smaller gap."""
    rows = tightness_known.looseness_rows(num_steps=(5,))
    gap = {row["variance"]: row["gap"] for row in rows}
    assert all(0 < row["model"] < row["gap"] for row in rows)
    assert gap["exact"] < gap["optimal"] < gap["fixed_large"] < gap["fixed_small"]


def test_gap_halves_when_t_doubles():
    """The 1/T of a constant variance, and the 1/T² of the one that is exact for each x_t."""
    short, long = (tightness_known.line_gaps(schedules.linear(num_steps)) for num_steps in (1000, 2000))
    for variance, factor in (("optimal", 2.0), ("exact", 4.0)):
        np.testing.assert_allclose(short[variance][0] / long[variance][0], factor, rtol=0.1)


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_the_loss_is_the_divergence_from_the_reversal_and_what_x0_adds(shift):
    """Each divergence of T = 2 by an integral over its own law, and not by entropies."""
    schedule, grid = schedules.cosine(2), tightness_known.GRID
    weight, m, v = tightness_known.LINE
    beta, alpha_bar = 1 - np.exp(np.float64(schedule.log_alpha[2])), np.exp(np.float64(schedule.log_alpha[1]))
    step = tightness_known.line_steps(schedule)[1]
    variance = step.variance("optimal")[0]
    mean = step.mean + shift * variance**0.5

    def density(x, mean, var):
        return np.exp(-((x - mean) ** 2) / (2 * var)) / np.sqrt(2 * np.pi * var)

    x_1 = density(grid, np.sqrt(alpha_bar) * m, alpha_bar * v + 1 - alpha_bar)
    joint = (weight * x_1).sum(axis=0)[:, None] * density(grid[None], np.sqrt(1 - beta) * grid[:, None], beta)
    ratio = np.log(np.maximum(joint, 1e-300)) - np.log(np.maximum(step.density, 1e-300))
    ratio -= np.log(np.maximum(density(grid[:, None], mean, variance), 1e-300))
    reversal = np.trapezoid(np.trapezoid(joint * ratio, grid), grid)
    found = tightness_known.line_targets(schedule, shift)
    assert found["reversal"] == pytest.approx(reversal, rel=1e-4)
    # Var(x_1 | x_2) = β̃_2 + Var(μ̃_2 | x_2), and the divergence of two Gaussians of variances β̃_2 and σ*².
    loss = 0.5 * (np.log(variance / step.beta_tilde) - 1 + 1 + shift**2)
    assert found["loss"] == pytest.approx(loss, rel=1e-9)
    assert found["loss"] == pytest.approx(found["reversal"] + found["information"], rel=1e-9)
    assert found["information"] > 0


@pytest.mark.slow
def test_a_wider_network_has_a_smaller_gap(monkeypatch, tmp_path):
    small = {"WIDTHS": (2, 16), "SEEDS": (0, 1), "SCHEDULE": schedules.cosine(10), "NUM_STEPS": 300, "POINTS": 101}
    for name, value in small.items():
        monkeypatch.setattr(tightness_capacity, name, value)
    found = tightness_capacity.rows()
    exact, narrow, wide = (found[k] for k in (0, 1, 3))
    assert exact["gap"] < wide["gap"] < narrow["gap"] and exact["mean_error"] < 1e-6
    assert all(0 < row["model_error"] < row["gap"] for row in found)
    table = tightness_capacity.table(found)
    assert "| exact mean | – |" in table and "| 3 layers of 16 | 882 | " in table and "n = 2 seeds" in table
    tightness_capacity.plot(tmp_path / "capacity.png", found)


def test_a_folder_without_a_run_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bound_tightness", f"--workdir={tmp_path / 'out'}", f"--run={tmp_path}"])
    with pytest.raises(SystemExit, match="2"):
        exit_with(bound_tightness.main)
    assert "holds no run (no config.json)" in capsys.readouterr().err


@pytest.mark.slow
def test_every_likelihood_of_one_network(tmp_path, monkeypatch):
    """A network that is exact for N(0, 0.3²) on 2×2 pixels: the ODE's density is known, and the rest lies around it."""
    from experiments import tightness_trained

    std, num_levels, schedule = 0.3, 17, schedules.cosine(50)
    data = oracles.normal(jnp.zeros((2, 2, 1)), jnp.full((2, 2, 1), std))

    def denoise(x_t, network_t):
        return jax.vmap(data.eps)(x_t, jnp.interp(network_t, schedule.network_t[1:], schedule.log_snr[1:]))

    model = Model(denoise, reverse.make("eps", "fixed_large"), schedule, num_levels)
    sizes = {"NUM_IMAGES": 64, "NUM_WEIGHTED": 20, "NUM_FEW": 2, "NUM_TRAJECTORIES": 200, "TRAJECTORIES_AT_ONCE": 200}
    for name, value in sizes.items():
        monkeypatch.setattr(tightness_trained, name, value)
    keys = jax.random.split(jax.random.key(0), 64)
    x0 = jnp.clip(jnp.round(jax.vmap(data.sample)(keys) * 8), -8, 8) / 8
    found = tightness_trained.compare(model, x0, keys)

    bpd = {name: np.asarray(values) for name, values in found["per_image_bpd"].items()}
    y = np.asarray(tightness_trained.dequantized(model, x0, keys), np.float64)
    log_density = -0.5 * (np.log(2 * np.pi * std**2) + y**2 / std**2) + np.log(2 / 16)
    # The solver's tolerance, and λ_1 in the place of clean data.
    np.testing.assert_allclose(bpd["ode_dequantized"], -log_density.mean(axis=(1, 2, 3)) / np.log(2), atol=0.03)
    np.testing.assert_allclose(found["exact_trace_bpd"], bpd["ode_dequantized"][:2], atol=0.01)  # no off-diagonal
    edges = np.arange(-8.5, 9) / 8 / std
    edges[[0, -1]] = -np.inf, np.inf
    mass = np.diff(scipy.stats.norm.cdf(edges))[np.asarray(x0 * 8, int) + 8]
    exact = -np.log2(mass).mean(axis=(1, 2, 3))
    for name in ("bound", "importance_weighted", "ode_behind_decoder"):
        excess = bpd[name] - exact
        assert -3 * excess.std(ddof=1) / 8 < excess.mean() < 0.2, name
    errors = {name: np.abs(bpd[name] - exact).mean() for name in ("bound", "importance_weighted")}
    assert errors["importance_weighted"] < 0.5 * errors["bound"]
    for name in ("bound", "bound_dequantized", "ode_dequantized", "ode_behind_decoder"):  # no x̂_0 leaves [−1, 1] here
        np.testing.assert_allclose(bpd[f"{name}_unclipped"], bpd[name], atol=1e-3, err_msg=name)
    weighted = np.asarray(found["importance_weighted"]["bpd"])
    assert found["importance_weighted"]["stderr"][-1] == [None, None]  # of one group of 200
    assert found["importance_weighted"]["k"][-1] == 200 and np.all(np.diff(weighted, axis=0) < 0)
    between = found["fraction_eps_mse"]
    np.testing.assert_allclose(between["middle"], between["neighbours"], rtol=0.2, atol=1e-3)

    summary.write_json(tmp_path / "found.json", found)  # which takes no NaN
    result = {"run": "a run", "step": 7, "image_numbers": list(range(64)), **summary.read_json(tmp_path / "found.json")}
    tightness_trained.plot(tmp_path / "trained.png", result)
    assert "| bound_dequantized | uniformly dequantized" in bound_tightness.trained_table(result)


def exact_model(schedule, std=0.3, **kwargs):
    """The model that is exact for N(0, std²) on 2×2 pixels of 17 levels."""
    data = oracles.normal(jnp.zeros((2, 2, 1)), jnp.full((2, 2, 1), std))
    noisiest = ode.lowest(schedule)

    def denoise(x_t, network_t):
        log_snr = jnp.maximum(schedule.log_snr, noisiest)
        return jax.vmap(data.eps)(x_t, jnp.interp(network_t, schedule.network_t[1:], log_snr[1:]))

    return Model(denoise, reverse.make("eps", "fixed_large", **kwargs), schedule, 17)


def three_images():
    """Keys and images."""
    return jax.random.split(jax.random.key(1), 3), jnp.asarray([-1.0, 0.25, 0.5]).repeat(4).reshape(3, 2, 2, 1)


def test_the_ode_behind_the_decoder_is_finite_where_x_t_is_only_noise():
    """ᾱ_T = 0, log SNR −∞."""
    from experiments import tightness_trained

    keys, x0 = three_images()
    assert np.isneginf(schedules.harmonic(10).log_snr[-1])
    assert np.isfinite(tightness_trained.ode_behind_decoder_bpd(exact_model(schedules.harmonic(10)), x0, keys)).all()


def test_the_bound_has_the_decoder_of_the_model(monkeypatch):
    from experiments import tightness_trained

    keys, x0 = three_images()
    for name in ("ode_behind_decoder_bpd", "ode_dequantized_bpd"):
        monkeypatch.setattr(tightness_trained, name, lambda model, x0, keys, **settings: jnp.zeros(len(x0)))
    for name in ("importance_weighted", "between_steps"):
        monkeypatch.setattr(tightness_trained, name, lambda *given: {})
    monkeypatch.setattr(tightness_trained, "NUM_WEIGHTED", 2)
    model = exact_model(schedules.cosine(10), decoder="bayes")
    bound = likelihood.bound_bpd(model.denoise, model.p, model.schedule, x0, keys, 17)
    found = tightness_trained.compare(model, x0, keys)["per_image_bpd"]
    np.testing.assert_allclose(found["bound"], bound, rtol=1e-5)


def test_a_network_that_needs_labels_is_refused(monkeypatch):
    from experiments import tightness_trained

    model = dataclasses.replace(exact_model(schedules.cosine(10)), takes_labels=True)
    run = SimpleNamespace(model=model, config=config_dict.ConfigDict({"model": {"label_dropout": 0.0}}))
    monkeypatch.setattr(workdir, "load", lambda directory, checkpoint: run)
    with pytest.raises(ValueError, match="model.conditional is on, and this study has no labels"):
        tightness_trained.measure("runs/a")


@pytest.mark.slow
def test_clipping_spoils_the_density_of_data_beyond_the_clip():
    """Dequantized pixel values reach ±1.0625 of 17 levels; a clipped x̂_0 cannot follow the exact one there."""
    from experiments import tightness_trained

    std, schedule = 0.1, schedules.cosine(50)
    data = oracles.normal(jnp.ones((2, 2, 1)), jnp.full((2, 2, 1), std))

    def denoise(x_t, network_t):
        return jax.vmap(data.eps)(x_t, jnp.interp(network_t, schedule.network_t[1:], schedule.log_snr[1:]))

    model = Model(denoise, reverse.make("eps", "fixed_large"), schedule, 17)
    keys, x0 = jax.random.split(jax.random.key(0), 8), jnp.ones((8, 2, 2, 1))
    y = np.asarray(tightness_trained.dequantized(model, x0, keys), np.float64)
    variance = std**2 + 1 / np.exp(np.float64(schedule.log_snr[1]))  # of x_1/√ᾱ_1, which the ODE takes for the data
    log_density = -0.5 * (np.log(2 * np.pi * variance) + (y - 1) ** 2 / variance) + np.log(2 / 16)
    exact = -log_density.mean(axis=(1, 2, 3)) / np.log(2)
    unclipped = tightness_trained.ode_dequantized_bpd(model, x0, keys, clip_x0=False)
    np.testing.assert_allclose(unclipped, exact, atol=0.02)
    assert np.abs(tightness_trained.ode_dequantized_bpd(model, x0, keys) - exact).max() > 0.2
