"""What a config may say: every key with its type and range, checked before anything is compiled or written."""

import difflib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from diffusion import learned_schedule, likelihood, objectives, reverse, samplers, schedules, timesteps


class Allowed(NamedTuple):
    """A test for a value, and the words that say what it allows."""

    accepts: Callable[[Any], bool]
    words: str


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def whole(at_least: int, at_most: int = 2**31 - 1) -> Allowed:
    end = "2³¹ − 1" if at_most == 2**31 - 1 else f"{at_most:,}"
    return Allowed(lambda v: _is_int(v) and at_least <= v <= at_most, f"a whole number in {at_least}…{end}")


def number(low: int | float, high: int | float, words: str) -> Allowed:
    return Allowed(lambda v: (_is_int(v) or isinstance(v, float)) and low <= v <= high, words)


def choice(*names: str) -> Allowed:
    return Allowed(lambda v: isinstance(v, str) and v in names, "one of " + ", ".join(names))


def wholes(at_least: int, empty: bool) -> Allowed:
    words = f"a tuple of whole numbers ≥ {at_least}" + (", or ()" if empty else "")
    check = lambda v: isinstance(v, tuple) and all(_is_int(i) and i >= at_least for i in v)  # noqa: E731
    return Allowed(lambda v: check(v) and (empty or len(v) > 0), words)


TEXT = Allowed(lambda v: isinstance(v, str), "a string")
FLAG = Allowed(lambda v: isinstance(v, bool), "True or False")
# The variance that the network was trained with, or one that needs nothing more than its mean.
FOR_A_TRAINED_MEAN = choice("model", *(name for name, v in reverse.VARIANCES.items() if not v.is_learned))

KEYS: dict[str, Allowed] = {
    "seed": whole(0),
    "init_from": TEXT,
    "data.name": TEXT,
    "data.data_dir": TEXT,
    "data.flip": FLAG,
    "schedule.name": choice(*schedules.SCHEDULES, learned_schedule.NAME),
    "schedule.num_steps": whole(1, at_most=1_000_000),
    "schedule.start": choice(*schedules.SCHEDULES),
    "schedule.inner": choice(*learned_schedule.INNER),
    "schedule.learning_rate": number(1e-12, 10, "a number in (0, 10]"),
    "model.prediction": choice(*reverse.PREDICTIONS),
    # The optimal variance follows from a trained mean, so nothing is trained with it.
    "model.variance": choice(*(name for name in reverse.VARIANCES if name != "optimal")),
    "unet.channels": whole(1),
    "unet.multipliers": wholes(1, empty=False),
    "unet.blocks": whole(1),
    "unet.attention_resolutions": wholes(1, empty=True),
    "unet.groups": whole(1),
    "unet.heads": whole(1),
    "unet.dropout": number(0, 0.999, "a number in [0, 0.999]"),
    "unet.scale_shift": FLAG,
    "unet.fourier_features": wholes(0, empty=True),
    "unet.dtype": choice("float32", "bfloat16"),
    "unet.remat": FLAG,
    "objective.name": choice(*objectives.OBJECTIVES),
    "objective.weighting": choice(*objectives.WEIGHTINGS),
    "objective.timesteps": choice(*timesteps.SAMPLERS),
    "optim.learning_rate": number(1e-12, 10, "a number in (0, 10]"),
    "optim.warmup_steps": whole(0),
    "optim.decay": choice("constant", "cosine"),
    "optim.grad_clip": number(0, 1e12, "a number ≥ 0 (0: no clip)"),
    "ema.decay": number(0, 1 - 1e-12, "a number in [0, 1)"),
    "train.num_steps": whole(1),
    "train.batch_size": whole(1),
    "train.grad_accum": whole(1),
    "train.steps_per_call": whole(1),
    "train.log_every": whole(1),
    "train.checkpoint_every": whole(1),
    "train.keep_checkpoints": whole(1),
    "train.sample_every": whole(0),
    "train.skip_nonfinite": whole(0),
    "train.check_replicas_every": whole(0),
    "eval.num_images": whole(0),
    "eval.batch_size": whole(1),
    "eval.protocol": choice(*likelihood.PROTOCOLS),
    "eval.variance": FOR_A_TRAINED_MEAN,
    "eval.terms_per_image": Allowed(
        lambda v: _is_int(v) and (v == 0 or v >= 3 and v % 2 == 1), "0 (all) or an odd number ≥ 3"
    ),
    "sample.num_images": whole(1),
    "sample.batch_size": whole(1),
    "sample.method": choice(*samplers.SAMPLERS),
    "sample.num_steps": whole(0),
    "sample.variance": FOR_A_TRAINED_MEAN,
    "sample.eta": number(0, 1, "a number in [0, 1]"),
}

# What a finished or resumed run may change: where the data lies, how it is watched, scored and sampled.
FREE = ("data.data_dir", "train.check_replicas_every", "eval.", "sample.")

# Keys that earlier versions did not have, and the value by which their runs were made.
ADDED = {
    "schedule.start": "linear",
    "schedule.inner": "bound",
    "schedule.learning_rate": 5e-3,
    "eval.variance": "model",
    "train.skip_nonfinite": 0,
    "train.check_replicas_every": 0,
}


def flatten(config: ConfigDict) -> dict[str, Any]:
    """{"unet.channels": 128, ...}; a group that is no group stays under its own name."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= {f"{name}.{key}": leaf for key, leaf in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def unknown(key: str) -> str:
    """The sentence about a key that does not exist."""
    near = difflib.get_close_matches(key, KEYS, n=1)
    return f"config key {key} does not exist" + (f"; did you mean {near[0]}?" if near else "")


def check(config: ConfigDict) -> None:
    """Raises a ValueError with one sentence on the first key that is unknown, missing, mistyped or impossible."""
    flat = flatten(config)
    for key in sorted(flat.keys() - KEYS.keys()):
        raise ValueError(unknown(key))
    for key, allowed in KEYS.items():
        if key not in flat:
            raise ValueError(f"config key {key} is missing; it must be {allowed.words}")
        if not allowed.accepts(flat[key]):
            raise ValueError(f"config key {key} must be {allowed.words}, not {flat[key]!r}")
    if config.objective.name == "simple" and reverse.VARIANCES[config.model.variance].is_learned:
        raise ValueError(
            f"objective.name='simple' has no term that trains model.variance={config.model.variance!r}; "
            "use hybrid or vlb, or a fixed variance"
        )
    if config.objective.name == "hybrid" and not reverse.VARIANCES[config.model.variance].is_learned:
        raise ValueError(
            f"objective.name='hybrid' trains a variance, but model.variance={config.model.variance!r} is fixed; "
            "use simple or vlb, or a learned variance"
        )
    if config.objective.weighting != "none" and config.objective.name == "vlb":
        raise ValueError(
            f"objective.weighting={config.objective.weighting!r} weights the simple loss, which objective.name='vlb' "
            "does not have; use none, or simple or hybrid"
        )
    if config.objective.weighting != "none" and config.model.prediction not in objectives.LOG_ERROR_RATIO:
        raise ValueError(
            f"objective.weighting={config.objective.weighting!r} is not defined for model.prediction="
            f"{config.model.prediction!r}; use none, or one of {', '.join(objectives.LOG_ERROR_RATIO)}"
        )
    if config.schedule.name == "harmonic" and config.model.prediction == "eps":
        raise ValueError(
            "schedule.name='harmonic' ends with ᾱ_T = 0, where x_0 cannot be told from ε; "
            "model.prediction must be x0, v or mean"
        )
    if config.schedule.name == learned_schedule.NAME and config.objective.name != "vlb":
        raise ValueError(
            f"objective.name={config.objective.name!r} is no bound, so its best schedule is the one that is easiest "
            "to predict; schedule.name='learned' needs objective.name='vlb'"
        )
    if config.schedule.name == learned_schedule.NAME and (config.schedule.inner, config.objective.timesteps) == (
        "variance",
        "loss_aware",
    ):
        raise ValueError(
            "schedule.inner='variance' minimises the variance over uniform t, which objective.timesteps='loss_aware' "
            "does not draw; use uniform or low_discrepancy, or schedule.inner='bound'"
        )
    if config.eval.terms_per_image >= config.schedule.num_steps:
        raise ValueError(
            f"eval.terms_per_image={config.eval.terms_per_image} must be below "
            f"schedule.num_steps={config.schedule.num_steps}; 0 takes every term"
        )
    if config.sample.method != "ancestral" and config.sample.variance != "model":
        raise ValueError(
            f"sample.variance={config.sample.variance!r} has no part in sample.method={config.sample.method!r}, which "
            "draws nothing from the model's variance (the noise of ddim is sample.eta)"
        )
    if config.sample.num_steps > config.schedule.num_steps:
        raise ValueError(
            f"sample.num_steps={config.sample.num_steps} exceeds schedule.num_steps={config.schedule.num_steps}"
        )


def to_json(config: ConfigDict) -> str:
    """The resolved config, as config.json holds it."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def completed(config: ConfigDict) -> ConfigDict:
    """`config` as this version writes it: with the keys that were added since, at the values that change nothing."""
    absent = {key: value for key, value in ADDED.items() if key not in flatten(config)}
    config.update_from_flattened_dict(absent)
    return config


def differing(config: ConfigDict, saved_json: str) -> list[str]:
    """ "key: saved → now" for each key that shaped the saved run and differs now."""
    now = flatten(ConfigDict(json.loads(to_json(config))))
    saved = ADDED | flatten(ConfigDict(json.loads(saved_json)))
    keys = [key for key in sorted(now.keys() | saved.keys()) if not key.startswith(FREE)]
    return [
        f"{key}: {saved.get(key, 'absent')} → {now.get(key, 'absent')}"
        for key in keys
        if saved.get(key) != now.get(key)
    ]
