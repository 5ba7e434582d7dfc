"""Loads a pipeline of diffusers: its U-Net, and the process of its training from the scheduler's settings.

Only the schedulers of DDPM and DDIM can be read. Settings that matter only in sampling are ignored: see `samplers`.
"""

import logging
from pathlib import Path
from typing import Any

import jax

from diffusion import reverse, schedules
from diffusion.interop import betas
from diffusion.interop.diffusers import load_diffusers
from diffusion.interop.files import json_object
from diffusion.model import Model
from diffusion.networks.named_tensors import first_few
from diffusion.networks.network import Network
from diffusion.runtime.files import expanded
from diffusion.schedules import Schedule

SCHEDULER_FILE = "scheduler_config.json"
NUM_LEVELS = 256
# The values of absent keys in diffusers.
DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",  # DDIM's scheduler has no such key; at eta = 1 its variance is this one
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "thresholding": False,
    "rescale_betas_zero_snr": False,
}
# Keys that matter only in sampling.
OF_SAMPLING = {"timestep_spacing", "steps_offset", "set_alpha_to_one", "skip_prk_steps", "sample_max_value"}
OF_SAMPLING |= {"dynamic_thresholding_ratio", "clip_predicted_image", "tensor_format", "timestep_values"}
CLASSES = ("DDPMScheduler", "DDIMScheduler")
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
VARIANCES = {  # "learned" is left out: their network's output is σ², ours log σ²
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned_range": "learned_range",
}
# beta_schedule -> β_1…β_T. The cosine is `schedules.cosine`.
BETAS = {
    "linear": betas.linear,
    "scaled_linear": betas.linear_root,
    "sigmoid": betas.sigmoid,
    "squaredcos_cap_v2": None,
}


def load_pipeline(directory: str | Path) -> Model:
    """Loads a model from a directory with a U-Net and a scheduler's settings, in subfolders or side by side.

    A model with classes takes labels: `guidance.conditional(model.denoise, labels)` is a denoiser.

    Raises:
        FileNotFoundError: a file of the network or of the scheduler does not exist.
        ValueError: `load_diffusers` refuses the network, or a `Model` cannot represent the scheduler.
    """
    folder = expanded(directory)
    path = next((found for found in places(folder) if found.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{places(folder)[0]} does not exist; a pipeline has its scheduler's settings there")
    try:
        settings = _checked(json_object(path))
        p = reverse.make(PREDICTIONS[settings["prediction_type"]], VARIANCES[settings["variance_type"]])
        schedule = _schedule(settings)
    except (ValueError, TypeError) as error:  # also for malformed JSON
        raise ValueError(f"{path}: {error}") from error
    unet, params = load_diffusers(folder)
    if unet.out_channels != (wanted := p.output_channels(params["conv_in"]["kernel"].shape[2])):
        raise ValueError(
            f"{path}: variance_type={settings['variance_type']!r} needs a network of {wanted} out_channels, "
            f"not {unet.out_channels}"
        )
    denoise = jax.tree_util.Partial(Network(unet, unet.out_channels), params)
    return Model(denoise, p, schedule, NUM_LEVELS, takes_labels=unet.num_classes > 0)


def places(folder: Path) -> tuple[Path, ...]:
    """The possible paths of the scheduler's settings."""
    return folder / "scheduler" / SCHEDULER_FILE, folder / SCHEDULER_FILE


def _checked(config: dict[str, Any]) -> dict[str, Any]:
    """The scheduler's settings, with defaults for absent keys."""
    name = config.get("_class_name")
    if name not in CLASSES:
        raise ValueError(f"_class_name={name!r} cannot be represented, only {' and '.join(CLASSES)}")
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    if unknown := sorted(own.keys() - DEFAULTS.keys() - OF_SAMPLING):
        logging.warning("the scheduler's %s is unknown and has no effect", first_few(unknown))
    settings = DEFAULTS | {key: value for key, value in own.items() if key in DEFAULTS}
    tables = {"prediction_type": PREDICTIONS, "variance_type": VARIANCES, "beta_schedule": BETAS}
    for key, table in tables.items():
        if settings[key] not in list(table):
            raise ValueError(f"{key}={settings[key]!r} cannot be represented, only {', '.join(table)}")
    kinds = {"num_train_timesteps": (int,), "beta_start": (int, float), "beta_end": (int, float)}
    for key, kind in kinds.items():
        if type(settings[key]) not in kind:
            raise ValueError(f"{key}={settings[key]!r} must be {'an integer' if kind == (int,) else 'a number'}")
    for key in ("thresholding", "rescale_betas_zero_snr"):
        if settings[key]:
            raise ValueError(f"{key}={settings[key]!r} cannot be represented, only False")
    if settings["clip_sample"] and settings["clip_sample_range"] != 1:
        raise ValueError(f"clip_sample_range={settings['clip_sample_range']!r} cannot be represented, only 1.0")
    if not settings["clip_sample"]:
        logging.warning("the scheduler does not clip x̂_0: samplers.sample(…, clip_x0=False) samples as it does")
    return settings


def _schedule(settings: dict[str, Any]) -> Schedule:
    if settings["trained_betas"] is not None:
        return schedules.from_betas(settings["trained_betas"])
    curve, num_steps = BETAS[settings["beta_schedule"]], settings["num_train_timesteps"]
    if curve is None:
        return schedules.cosine(num_steps)
    return schedules.from_betas(curve(float(settings["beta_start"]), float(settings["beta_end"]), num_steps))
