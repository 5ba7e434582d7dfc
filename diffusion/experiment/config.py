"""What a config may say: every key with its type and range, checked before anything is compiled or written."""

import dataclasses
import difflib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from diffusion import learned_schedule, likelihood, objectives, reverse, samplers, schedules, timesteps
from diffusion.data.source import SPLITS
from diffusion.evaluation import quality
from diffusion.experiment import names
from diffusion.experiment.names import Choice
from diffusion.networks import NETWORKS
from diffusion.training import optimizer


class Constraint(NamedTuple):
    """A test for a value, and the words that say what it allows."""

    accepts: Callable[[Any], bool]
    words: str

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, to follow "config key KEY"; None if nothing is."""
        return None if self.accepts(value) else f"must be {self.words}, not {value!r}"


def integer(at_least: int, at_most: int = 2**31 - 1) -> Constraint:
    end = "2³¹ − 1" if at_most == 2**31 - 1 else f"{at_most:,}"
    return Constraint(lambda v: names.accepts(int, v) and at_least <= v <= at_most, f"an integer in {at_least}…{end}")


def number(low: float | int, high: float | int, words: str) -> Constraint:
    return Constraint(lambda v: names.accepts(float, v) and low <= v <= high, words)


def of_type(annotation: Any) -> Constraint:
    return Constraint(lambda v: names.accepts(annotation, v), names.words(annotation))


TEXT, FLAG = of_type(str), of_type(bool)
NETWORK_GIVEN = ("out_channels", "num_classes", "parent", "name")
# The variance that the network was trained with, or one that needs nothing more than its mean.
FOR_A_TRAINED_MEAN = Choice({"model": None} | {k: v for k, v in reverse.VARIANCES.items() if not v.is_learned})
# What a learned schedule starts from.
FIXED_SCHEDULES = Choice(schedules.SCHEDULES, given=("num_steps",))

KEYS: dict[str, Constraint | Choice] = {
    "seed": integer(0),
    "init_from": TEXT,
    "data.name": TEXT,
    "data.data_dir": TEXT,
    "data.image_size": integer(0, at_most=65_536),
    "data.pad_to": integer(0, at_most=65_536),
    "data.placement": Choice({"auto": None, "devices": None, "disk": None}),
    "data.flip": FLAG,
    "schedule.name": Choice(
        schedules.SCHEDULES | {learned_schedule.NAME: learned_schedule.Learned}, given=("num_steps",)
    ),
    "schedule.num_steps": integer(1, at_most=1_000_000),
    "model.network": Choice(NETWORKS, given=NETWORK_GIVEN),
    "model.prediction": Choice(reverse.PREDICTIONS),
    # The optimal variance follows from a trained mean, so nothing is trained with it.
    "model.variance": Choice({name: v for name, v in reverse.VARIANCES.items() if name != "optimal"}),
    "model.conditioning": Choice({"t": None, "gamma": None}),
    "model.decoder": Choice(dict.fromkeys(reverse.DECODERS)),
    "model.conditional": FLAG,
    "model.label_dropout": number(0, 1 - 1e-12, "a number in [0, 1)"),
    "objective.name": Choice(objectives.OBJECTIVES, given=("p", "num_steps", "num_levels", "weighting")),
    "objective.weighting": Choice(objectives.WEIGHTINGS, given=("p",)),
    "objective.timesteps": Choice(timesteps.SAMPLERS),
    "optim.name": Choice(optimizer.OPTIMIZERS, given=("learning_rate",)),
    "optim.learning_rate": number(1e-12, 10, "a number in (0, 10]"),
    "optim.warmup_steps": integer(0),
    "optim.decay": Choice(optimizer.DECAYS, given=("peak", "num_steps")),
    "optim.grad_clip": number(0, 1e12, "a number ≥ 0 (0: no clip)"),
    "ema.decay": number(0, 1 - 1e-12, "a number in [0, 1)"),
    "train.num_steps": integer(1),
    "train.batch_size": integer(1),
    "train.grad_accum": integer(1),
    "train.steps_per_call": integer(1),
    "train.log_every": integer(1),
    "train.checkpoint_every": integer(1),
    "train.keep_checkpoints": integer(1),
    "train.sample_every": integer(0),
    "train.monitor_images": integer(1),
    "train.skip_nonfinite": integer(0),
    "train.check_replicas_every": integer(0),
    "eval.num_images": integer(0),
    "eval.batch_size": integer(1),
    "eval.protocol": Choice(likelihood.PROTOCOLS),
    "eval.variance": FOR_A_TRAINED_MEAN,
    "eval.terms_per_image": Constraint(
        lambda v: names.accepts(int, v) and (v == 0 or v >= 3 and v % 2 == 1), "0 (all) or an odd number ≥ 3"
    ),
    "sample.num_images": integer(1),
    "sample.num_previews": integer(1),
    "sample.batch_size": integer(1),
    "sample.method": Choice(samplers.SAMPLERS, given=("denoise", "p", "schedule", "keys", "shape", "num_frames")),
    "sample.num_steps": integer(0),
    "sample.variance": FOR_A_TRAINED_MEAN,
    "sample.labels": Constraint(
        lambda v: names.accepts(tuple[int, ...], v) and min(v, default=0) >= 0, "a tuple of integers ≥ 0, or () for all"
    ),
    "sample.guidance": number(-1, 1000, "a number in [-1, 1000]"),
    "sample.guidance_interval": Constraint(
        lambda v: names.accepts(tuple[float, ...], v) and (v == () or len(v) == 2 and v[0] < v[1]),
        "(low, high) with low < high, or () for every t",
    ),
    "quality.num_images": integer(2),
    "quality.features": Choice(quality.FEATURES, given=("train_set",)),
    "quality.reference": Constraint(
        lambda v: names.accepts(str, v) and (v in SPLITS or v.endswith(".npz")),
        "train, test or the path of an .npz file with mu and sigma",
    ),
    "quality.every": integer(0),
    "compress.batch_size": integer(1, at_most=65_536),
    "compress.precision": integer(0, at_most=10),
}

# What may change between the legs of a run: where the data lies, with what means the same is computed, how it is
# watched, scored and sampled. PARTLY_FREE has two more.
FREE = (
    *("data.data_dir", "data.placement", "unet.remat", "train.grad_accum", "train.steps_per_call"),
    *("train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "train.sample_every"),
    *("train.check_replicas_every", "eval.", "sample.", "quality."),
    "compress.",
)


def network_keys() -> dict[str, Constraint]:
    """The fields of every network as keys, `unet.channels`; a config may leave them out."""
    return {
        f"{name}.{field.name}": of_type(field.type)
        for name, module in NETWORKS.items()
        for field in dataclasses.fields(module)
        if field.name not in NETWORK_GIVEN
    }


def all_keys() -> dict[str, Constraint | Choice]:
    """Every key that a config may have."""
    return KEYS | network_keys()


def flatten(config: ConfigDict) -> dict[str, Any]:
    """{"unet.channels": 128, ...}; a value outside any group stays under its own name."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= {f"{name}.{key}": leaf for key, leaf in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def unknown(key: str) -> str:
    """The error message about a key that does not exist."""
    near = difflib.get_close_matches(key, all_keys(), n=1)
    return f"config key {key} does not exist" + (f"; did you mean {near[0]}?" if near else "")


def check(config: ConfigDict) -> None:
    """Raises a ValueError with one line on the first key that is unknown, missing, mistyped or out of range."""
    flat, known = flatten(config), all_keys()
    for key in sorted(flat.keys() - known.keys()):
        raise ValueError(unknown(key))
    for key in KEYS.keys() - flat.keys():
        raise ValueError(f"config key {key} is missing")
    for key, constraint in known.items():
        problem = constraint.problem(flat[key]) if key in flat else None
        if problem:
            raise ValueError(f"config key {key} {problem}")


def to_json(config: ConfigDict) -> str:
    """The resolved config, as config.json holds it."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote, locked. JSON knows lists only; in a config all of them are tuples.

    Raises:
        ValueError: it is not the JSON of a config.
    """

    def with_tuples(group: dict[str, Any]) -> dict[str, Any]:
        return {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()}

    groups = json.loads(text, object_hook=with_tuples)
    if not isinstance(groups, dict):
        raise ValueError("it is not the JSON of a config")
    return ConfigDict(groups).lock()


def from_file(path: str, overrides: dict[str, str]) -> ConfigDict:
    """The config of a file in configs/, as main.py resolves it; not checked.

    Args:
        path: what --config would be.
        overrides: config key -> value, written as for --config.KEY=VALUE.

    Raises:
        ValueError: the file cannot be read, a key does not exist, or a value cannot be read as what the file has.
    """
    for key in overrides:
        if key not in all_keys():
            raise ValueError(unknown(key))
    argv = ["main.py", f"--config={path}", *(f"--config.{key}={value}" for key, value in overrides.items())]
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        values(argv)
        holder.value.keys()  # where there is no such file, the first use says so
    except (flags.Error, TypeError, ValueError, ImportError, OSError) as error:
        raise ValueError(str(error)) from error
    return holder.value


def differing(config: ConfigDict, saved: ConfigDict) -> list[str]:
    """ "key: saved → now" for each key that shaped the saved run and differs now, with the reason where it has one."""
    now, then = flatten(config), flatten(saved)
    changes = []
    for key in sorted(now.keys() | then.keys()):
        if key.startswith(FREE) or now.get(key) == then.get(key):
            continue
        change = f"{key}: {then.get(key, 'absent')} → {now.get(key, 'absent')}"
        if key not in PARTLY_FREE or key not in then:
            changes.append(change)
        elif reason := PARTLY_FREE[key](config, then[key]):
            changes.append(f"{change}, {reason}")
    return changes


def _why_not_longer(config: ConfigDict, old: int) -> str:
    """Why a run of `old` steps cannot become longer; "" if it can, because none of them depends on their number."""
    if config.train.num_steps < old:
        return "but a run can only become longer"
    if names.parse(config.schedule.name).name == learned_schedule.NAME:
        return "on which the learning rate of a learned schedule depends"
    made = np.linspace(0, max(0, old - 1 - config.optim.warmup_steps), 100).astype(int)
    decay = KEYS["optim.decay"].bind(config.optim.decay)
    rates = [decay(1.0, num_steps - config.optim.warmup_steps) for num_steps in (old, config.train.num_steps)]
    with jax.numpy_dtype_promotion("standard"):  # Optax multiplies integer steps with floats
        is_same = np.array_equal(*(rate(made) for rate in rates))
    return "" if is_same else f"on which optim.decay={config.optim.decay!r} depends"


def _why_not_skipping(config: ConfigDict, old: int) -> str:
    """Why another number of updates cannot be left out; "" if it can."""
    is_same = (config.train.skip_nonfinite > 0) == (old > 0)
    return "" if is_same else "but 0 or more than 0 is settled when a run begins"


# Keys that may change in part: (config, saved value) -> why this change is refused, or "".
PARTLY_FREE: dict[str, Callable[[ConfigDict, int], str]] = {
    "train.num_steps": _why_not_longer,
    "train.skip_nonfinite": _why_not_skipping,
}
