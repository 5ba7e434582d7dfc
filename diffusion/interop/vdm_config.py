"""Reads `config.model` of google-research/vdm: the settings of γ and of the pixel values."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion import schedules
from diffusion.conditioning import NUM_STEPS
from diffusion.interop.files import json_object
from diffusion.networks.named_tensors import first_few
from diffusion.schedules import Schedule

CONFIG_FILE = "config.json"
# Settings that a checkpoint does not contain, with the values of all published configs.
DEFAULTS = {"vocab_size": 256, "gamma_min": -13.3, "gamma_max": 5.0, "sm_n_timesteps": 0}
# Settings that follow from the tensors of a checkpoint.
TOLD = ("gamma_type", "with_fourier_features", "with_attention", "sm_n_embd", "sm_n_layer")
# Settings that matter only in training or sampling.
NO_MATTER = ("sample_softmax", "antithetic_time_sampling", "sm_pdrop")
SAMPLING_STEPS = 1000  # in the original code, if T is infinite (sm_n_timesteps=0)
NUM_FEATURES = 1024  # of γ, if it is a network
# gamma_type -> the parameters of γ.
CURVES = {
    "learnable_nnet": {
        "l1/kernel": (1, 1),
        "l1/bias": (1,),
        "l2/kernel": (1, NUM_FEATURES),
        "l2/bias": (NUM_FEATURES,),
        "l3/kernel": (NUM_FEATURES, 1),
    },
    "learnable_scalar": {"w": (1,), "b": (1,)},
    "fixed": {},
}
Tensors = Mapping[str, np.ndarray]


def from_file(path: Path) -> dict[str, Any]:
    """`config.model` from a JSON file that holds it or the whole config. Raises a ValueError if it is not an object."""
    try:
        given = json_object(path)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    model = given.get("model", given)
    if not isinstance(model, dict):
        raise ValueError(f"{path.name}: model={model!r} must be an object of names and values")
    return model


def read(folders: Sequence[Path], config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings from the caller, else from config.json in the first folder that has one, else the defaults.

    Raises:
        ValueError: an unknown key, or an invalid value.
    """
    found = next((path for folder in folders if (path := folder / CONFIG_FILE).is_file()), None)
    given = from_file(found) if found else {}
    settings = DEFAULTS | given | dict(config or {})
    if unknown := sorted(settings.keys() - DEFAULTS.keys() - set(TOLD) - set(NO_MATTER)):
        raise ValueError(f"{first_few(unknown)} is not a key of VDM's config.model")
    for name in DEFAULTS:
        kinds = (int, float) if name.startswith("gamma") else (int,)
        if type(settings[name]) not in kinds or not np.isfinite(settings[name]):
            raise ValueError(f"{name}={settings[name]!r} must be {'a number' if float in kinds else 'an integer'}")
    if not settings["gamma_min"] < settings["gamma_max"]:
        raise ValueError(f"gamma_min={settings['gamma_min']} must be below gamma_max={settings['gamma_max']}")
    if settings["vocab_size"] < 2 or settings["sm_n_timesteps"] < 0:
        low = "vocab_size" if settings["vocab_size"] < 2 else "sm_n_timesteps"
        raise ValueError(f"{low}={settings[low]} must be at least {2 if low == 'vocab_size' else 0}")
    return settings


def refuse_contradictions(settings: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """Raises a ValueError that names the settings that the file contradicts."""
    wrong = [
        f"{name} is {settings[name]} by the config and {seen} in the file"
        for name, seen in told.items()
        if name in settings and settings[name] != seen
    ]
    if wrong:
        raise ValueError("; ".join(wrong))


def gamma(kind: str, settings: Mapping[str, Any], tensors: Tensors) -> Callable[[np.ndarray], np.ndarray]:
    """γ(t) for t [n] in [0, 1], in float64: a straight line, or an increasing network."""
    low, high = settings["gamma_min"], settings["gamma_max"]
    own = {name.removeprefix("gamma/"): np.float64(leaf) for name, leaf in tensors.items() if name.startswith("gamma/")}

    def straight(t: np.ndarray) -> np.ndarray:
        return low + (high - low) * t

    def scalar(t: np.ndarray) -> np.ndarray:
        return own["b"] + np.abs(own["w"]) * t

    def network(t: np.ndarray) -> np.ndarray:
        column = t[:, None]
        inside = np.abs(own["l2/kernel"]) * (2 * column - 1) + own["l2/bias"]
        bend = np.tanh(inside / 2) @ np.abs(own["l3/kernel"]) / NUM_FEATURES
        return (np.abs(own["l1/kernel"]) * column + own["l1/bias"] + bend)[:, 0]

    return {"fixed": straight, "learnable_scalar": scalar, "learnable_nnet": network}[kind]


def schedule(settings: Mapping[str, Any], curve: Callable[[np.ndarray], np.ndarray]) -> Schedule:
    """The schedule of a curve γ. Raises a ValueError if it does not increase."""
    num_steps = settings["sm_n_timesteps"] or SAMPLING_STEPS
    values = curve(np.linspace(0.0, 1.0, num_steps + 1))
    if not (np.diff(values) > 0).all():
        raise ValueError("γ does not increase")
    low, high = settings["gamma_min"], settings["gamma_max"]
    scale = (settings["vocab_size"] - 1) / settings["vocab_size"]
    return schedules.from_gamma(values, NUM_STEPS * (values - low) / (high - low), scale)
