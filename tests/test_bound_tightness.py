"""The study's own quadratures against closed forms, and its commands on what is small."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import oracles, schedules
from experiments import bound_tightness, tightness_capacity, tightness_known


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


def test_a_wider_network_has_a_smaller_gap(monkeypatch):
    monkeypatch.setattr(tightness_capacity, "WIDTHS", (2, 16))
    monkeypatch.setattr(tightness_capacity, "SCHEDULE", schedules.cosine(10))
    monkeypatch.setattr(tightness_capacity, "NUM_STEPS", 300)
    monkeypatch.setattr(tightness_capacity, "NUM_SCORED", 1024)
    exact, narrow, wide = tightness_capacity.rows()
    assert exact["gap"][0] < wide["gap"][0] < narrow["gap"][0]
    assert wide["mean_error"][0] > 3 * wide["mean_error"][1] > 0
    table = bound_tightness.capacity_table([exact, narrow, wide])
    assert "| exact score | – |" in table and "| 3 layers of 16 | " in table


def test_a_folder_without_a_run_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bound_tightness", f"--workdir={tmp_path / 'out'}", f"--run={tmp_path}"])
    with pytest.raises(SystemExit, match="2"):
        bound_tightness.main()
    assert "holds no run (no config.json)" in capsys.readouterr().err


def test_one_checkpoint_side_by_side(tmp_path, monkeypatch):
    """An untrained network: the first of the IW bounds is the bound, and both traces see the same ODE."""
    from configs import digits
    from diffusion import build, workdir
    from diffusion.checkpoint import Checkpoints
    from experiments import tightness_trained

    settings = digits.get_config()
    small = {
        "schedule.num_steps": 4, "unet.channels": 8, "unet.multipliers": (1,), "unet.blocks": 1, "unet.groups": 4,
        "unet.attention_resolutions": (), "unet.fourier_features": (), "data.data_dir": str(tmp_path / "data"),
    }  # fmt: skip
    with settings.unlocked():
        settings.update_from_flattened_dict(small)
    workdir.claim(settings, tmp_path / "run")
    experiment = build.experiment(settings, (8, 8, 1), 17)
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(0, jax.device_get(experiment.initial_state()), {"test_loss": 1.0})
    for name, value in {"NUM_IMAGES": 3, "NUM_FEW": 1, "NUM_TRAJECTORIES": 20, "TRAJECTORIES_AT_ONCE": 20}.items():
        monkeypatch.setattr(tightness_trained, name, value)
    result = json.loads(json.dumps(tightness_trained.measure(tmp_path / "run")))
    assert result["per_image_bpd"].keys() == tightness_trained.ROWS.keys()
    weighted = np.asarray(result["importance_weighted"]["bpd"])[:, 0]
    assert result["importance_weighted"]["k"] == [1, 2, 5, 10, 20] and np.all(np.diff(weighted) < 0)
    error = result["importance_weighted"]["stderr"][0][0]
    assert abs(weighted[0] - result["per_image_bpd"]["bound"][0]) < 6 * 20**0.5 * error
    # Nearly linear at its initialisation, the field has a divergence that signs see without error.
    np.testing.assert_allclose(result["exact_trace_bpd"][0], result["per_image_bpd"]["ode_dequantized"][0], rtol=0.02)
    tightness_trained.plot(tmp_path / "trained.png", result)
    assert "| bound_dequantized | uniformly dequantized" in bound_tightness.trained_table(result)
