"""Pipelines of diffusers: the process is the scheduler's, and unsupported settings are refused by name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from diffusion import interop
from diffusion.interop import pipelines

GOLDEN = Path(__file__).parents[1] / "golden"
SCHEDULER = {"_class_name": "DDPMScheduler", "_diffusers_version": "0.42.1", "num_train_timesteps": 40}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A function of the scheduler's settings: the model of a pipeline with the tiny network."""
    (tmp_path / "unet").mkdir()
    shutil.copyfile(GOLDEN / "unet_tiny.json", tmp_path / "unet" / "config.json")
    shutil.copyfile(GOLDEN / "unet_tiny.safetensors", tmp_path / "unet" / "diffusion_pytorch_model.safetensors")

    def model(folder="scheduler", **changes):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "scheduler_config.json").write_text(json.dumps(SCHEDULER | changes))
        return interop.load_pipeline(tmp_path)

    return model


def test_the_network_is_the_one_that_load_diffusers_reads(made, tmp_path):
    model = made(folder=".")
    unet, params = interop.load_diffusers(tmp_path)
    assert model.denoise.func.module == unet and not model.takes_labels and model.num_levels == 256
    np.testing.assert_array_equal(model.denoise.args[0]["conv_in"]["kernel"], params["conv_in"]["kernel"])
    assert (model.p.prediction, model.p.variance, model.schedule.num_steps) == ("eps", "fixed_small", 40)


# β_1, β_20 and β_40 of diffusers 0.42.1's DDPMScheduler(num_train_timesteps=40, …), in float32.
@pytest.mark.parametrize(
    ("settings", "betas"),
    [
        ({}, [1e-4, 0.0097948713, 0.02]),
        ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, [0.00085, 0.0046674856, 0.012]),
        ({"beta_schedule": "squaredcos_cap_v2"}, [0.0024871654, 0.073089182, 0.999]),
        ({"beta_schedule": "sigmoid"}, [0.0001492052, 0.0092861224, 0.019950796]),
        ({"trained_betas": np.linspace(0.1, 0.5, 40).tolist()}, [0.1, 0.1 + 0.4 * 19 / 39, 0.5]),
    ],
)
def test_betas_are_the_scheduler_s(settings, betas):
    schedule = pipelines._schedule(pipelines._checked(SCHEDULER | settings))
    np.testing.assert_allclose(schedule.beta[np.array([1, 20, 40])], betas, rtol=2e-6)


def test_prediction_and_variance_are_the_scheduler_s(made):
    p = made(prediction_type="v_prediction", variance_type="fixed_large", timestep_spacing="trailing").p
    assert (p.prediction, p.variance) == ("v", "fixed_large")


def test_what_has_no_effect_here_is_a_warning(caplog):
    pipelines._checked(SCHEDULER | {"clip_sample": False, "colour": 3})
    assert "the scheduler's colour is unknown" in caplog.text
    assert "samplers.sample(…, clip_x0=False)" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "PNDMScheduler"}, "_class_name='PNDMScheduler' cannot be represented, only DDPMScheduler and"),
        ({"prediction_type": "flow"}, "prediction_type='flow' cannot be represented, only epsilon, sample, "),
        ({"beta_schedule": "laplace"}, "beta_schedule='laplace' cannot be represented, only linear, "),
        ({"thresholding": True}, "thresholding=True cannot be represented, only False"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True cannot be represented, only False"),
        ({"clip_sample_range": 2.0}, "clip_sample_range=2.0 cannot be represented, only 1.0"),
        ({"variance_type": "learned_range"}, "variance_type='learned_range' needs a network of 6 out_channels, not 3"),
        ({"variance_type": "learned"}, "variance_type='learned' cannot be represented, only fixed_small, "),
        ({"beta_end": 2}, r"β must lie in \(0, 1\]"),
        ({"beta_start": "small"}, "beta_start='small' must be a number"),
        ({"prediction_type": ["epsilon"]}, r"prediction_type=\['epsilon'\] cannot be represented, only epsilon, "),
        ({"num_train_timesteps": 40.5}, "num_train_timesteps=40.5 must be an integer"),
        ({"num_train_timesteps": 0}, "the number of steps|list of T ≥ 1 numbers"),
        ({"trained_betas": ["a"]}, "could not convert string to float"),
    ],
)
def test_what_a_model_cannot_be_is_refused_by_name(changes, message, made):
    with pytest.raises(ValueError, match=f"scheduler/scheduler_config.json: .*{message}") as raised:
        made(**changes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("held", "message"), [("{", "Expecting"), ("[1]", "it must hold a JSON object of names")])
def test_damage_of_the_network_is_not_the_scheduler_s(held, message, made, tmp_path):
    (tmp_path / "unet" / "config.json").write_text(held)
    with pytest.raises(ValueError, match=f"unet/config.json: {message}") as raised:
        made()
    assert "scheduler" not in str(raised.value)


def test_without_a_scheduler_it_is_no_pipeline(tmp_path):
    with pytest.raises(FileNotFoundError, match="scheduler/scheduler_config.json does not exist; a pipeline has"):
        interop.load_pipeline(tmp_path)
