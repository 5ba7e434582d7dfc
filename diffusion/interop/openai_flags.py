"""The command-line flags of improved-diffusion and guided-diffusion, and the models that they describe.

Both packages build the network and the process from flags that are not in the checkpoint. A value is either its text on
the command line ("True", "16,8") or the Python value. Source: their script_util.py and respace.py.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion import conditioning, reverse, schedules
from diffusion.interop.files import json_object
from diffusion.networks.adm import ADM
from diffusion.networks.named_tensors import first_few
from diffusion.reverse import Reverse
from diffusion.runtime.files import expanded
from diffusion.schedules import Schedule

IMPROVED, GUIDED = "improved_diffusion", "guided_diffusion"
NUM_CHANNELS_OF_IMAGES, NUM_GROUPS, NORM_EPS = 3, 32, 1e-5
NUM_CLASSES = 1000

# Defaults that both packages share.
SHARED = {
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "attention_resolutions": "16,8",
    "dropout": 0.0,
    "class_cond": False,
    "use_checkpoint": False,
    "use_scale_shift_norm": True,
    "learn_sigma": False,
    "sigma_small": False,  # no flag of guided-diffusion's command line, but an argument of its function
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "timestep_respacing": "",
    "use_kl": False,
    "predict_xstart": False,
}
# All defaults of each package.
DEFAULTS = {
    IMPROVED: SHARED | {"rescale_timesteps": True, "rescale_learned_sigmas": True},
    GUIDED: SHARED
    | {
        "rescale_timesteps": False,
        "rescale_learned_sigmas": False,
        "num_head_channels": -1,
        "channel_mult": "",
        "resblock_updown": False,
        "use_fp16": False,
        "use_new_attention_order": False,
    },
}
# image_size -> channel_mult. guided-diffusion's flag takes only integers, so it cannot express the value for 512.
CHANNEL_MULT = {
    IMPROVED: {32: (1, 2, 2, 2), 64: (1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4)},
    GUIDED: {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)},
}
# A field of `ADM` -> its flag, if the names differ.
FLAG_OF = {
    "channels": "num_channels",
    "num_heads_up": "num_heads_upsample",
    "head_channels": "num_head_channels",
    "scale_shift_norm": "use_scale_shift_norm",
    "block_resampling": "resblock_updown",
}
TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


def read(flags: Mapping[str, Any]) -> dict[str, Any]:
    """All flags of the package as Python values, with "package".

    Raises:
        ValueError: an unknown flag, a value of the wrong type, or flags that leave the package open.
    """
    package = _package(flags)
    defaults = DEFAULTS[package]
    given = {name: value for name, value in flags.items() if name != "package"}
    if unknown := sorted(given.keys() - defaults.keys()):
        raise ValueError(f"{package} has no flag {first_few(unknown)}; it has {', '.join(sorted(defaults))}")
    values = {name: _value(name, value, defaults[name]) for name, value in given.items()}
    return defaults | values | {"package": package}


def beside(pt_file: str | Path) -> dict[str, Any]:
    """The flags in the JSON file beside a checkpoint, FILE.json for FILE.pt. Errors are those of `from_file`."""
    path = expanded(pt_file).with_suffix(".json")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it must hold the flags that {pt_file} was trained with")
    return from_file(path)


def from_file(path: Path) -> dict[str, Any]:
    """The flags in a JSON file. Raises an OSError, or the errors of `read` with the file's name."""
    try:
        return read(json_object(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _package(flags: Mapping[str, Any]) -> str:
    """The package: as given, or the only one with these flags, or the one whose other defaults do not matter."""
    if "package" in flags:
        package = str(flags["package"]).replace("-", "_")
        if package not in DEFAULTS:
            raise ValueError(f"package={flags['package']!r} must be {IMPROVED} or {GUIDED}")
        return package
    of_guided = flags.keys() & (DEFAULTS[GUIDED].keys() - DEFAULTS[IMPROVED].keys())
    decided = "rescale_timesteps" in flags  # the only default that differs and matters after training
    # improved-diffusion's training has a flag use_fp16, too, so that one alone does not name the package.
    if of_guided - {"use_fp16"} or (of_guided and decided):
        return GUIDED
    if decided:
        return IMPROVED
    raise ValueError(
        f"the flags fit two packages with other defaults of rescale_timesteps: add package={IMPROVED!r} or {GUIDED!r}"
    )


def _value(name: str, value: Any, default: Any) -> Any:
    """The flag's value as the type of its default."""
    wanted = {bool: "True or False", int: "an integer", float: "a number", str: "a string"}[type(default)]
    refusal = ValueError(f"{name}={value!r} must be {wanted}")
    if isinstance(default, bool):
        if str(value).lower() not in TRUE + FALSE:
            raise refusal
        return str(value).lower() in TRUE
    if isinstance(default, str):
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    try:
        if isinstance(value, bool) or type(default)(value) != float(value):
            raise refusal
        return type(default)(value)
    except (TypeError, ValueError):
        raise refusal from None


def network(flags: Mapping[str, Any], num_classes: int = NUM_CLASSES) -> ADM:
    """The network that flags from `read` describe.

    Args:
        num_classes: the number of classes if class_cond is set; 1000 in both packages.

    Raises:
        ValueError: the flags describe no valid network; the message is one line.
    """
    size = flags["image_size"]
    multipliers = channel_mult(flags)
    # Attention is at levels that divide the height by the same integer as a named resolution does.
    factors = {size // height for height in _integers("attention_resolutions", flags) if height > 0}
    adm = ADM(
        channels=flags["num_channels"],
        channel_mult=multipliers,
        num_res_blocks=flags["num_res_blocks"],
        attention_resolutions=tuple(size >> i for i in range(len(multipliers)) if 2**i in factors),
        num_groups=NUM_GROUPS,
        norm_eps=NORM_EPS,
        num_heads=flags["num_heads"],
        num_heads_up=max(flags["num_heads_upsample"], 0),
        head_channels=max(flags.get("num_head_channels", -1), 0),
        dropout=flags["dropout"],
        scale_shift_norm=flags["use_scale_shift_norm"],
        block_resampling=flags.get("resblock_updown", False),
        num_classes=num_classes if flags["class_cond"] else 0,
        out_channels=process(flags).output_channels(NUM_CHANNELS_OF_IMAGES),
        remat=flags["use_checkpoint"],
    )
    try:
        adm.check((size, size, NUM_CHANNELS_OF_IMAGES))
    except ValueError as error:  # with the names of the flags
        raise ValueError(re.sub(r"\badm\.(\w+)", lambda m: FLAG_OF.get(m[1], m[1]), str(error))) from error
    return adm


def channel_mult(flags: Mapping[str, Any]) -> tuple[float | int, ...]:
    """The widths of the levels in units of num_channels: as given, or the default for the image_size."""
    if flags.get("channel_mult"):
        return _integers("channel_mult", flags)
    package, size = flags["package"], flags["image_size"]
    if size not in CHANNEL_MULT[package]:
        sizes = ", ".join(map(str, CHANNEL_MULT[package]))
        other = " or a channel_mult" if package == GUIDED else ""
        raise ValueError(f"image_size={size} must be one of {sizes}{other} in {package}")
    return CHANNEL_MULT[package][size]


def _integers(name: str, flags: Mapping[str, Any]) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in flags[name].split(","))
    except ValueError:
        raise ValueError(f"{name}={flags[name]!r} must be integers with commas between them") from None


def of_network(adm: ADM, image_size: int, new_order: bool) -> dict[str, Any]:
    """guided-diffusion's flags of a network. Raises a ValueError if it cannot represent a field."""
    adm.check((image_size, image_size, NUM_CHANNELS_OF_IMAGES))
    for name, needed in {"num_groups": NUM_GROUPS, "norm_eps": NORM_EPS}.items():
        if getattr(adm, name) != needed:
            raise ValueError(f"adm.{name}={getattr(adm, name)} has no place in guided-diffusion, which has {needed}.")
    if not adm.attention_resolutions:
        raise ValueError("adm.attention_resolutions=() has no place in guided-diffusion, which needs one or more.")
    multipliers = ",".join(str(int(factor)) for factor in adm.channel_mult)
    if CHANNEL_MULT[GUIDED].get(image_size) == tuple(adm.channel_mult):
        multipliers = ""
    elif any(factor != int(factor) for factor in adm.channel_mult):
        raise ValueError(f"adm.channel_mult={adm.channel_mult} has no place in guided-diffusion, which takes integers.")
    return {
        "package": GUIDED,
        "image_size": image_size,
        "num_channels": adm.channels,
        "channel_mult": multipliers,
        "num_res_blocks": adm.num_res_blocks,
        "attention_resolutions": ",".join(map(str, adm.attention_resolutions)),
        "num_heads": adm.num_heads,
        "num_heads_upsample": adm.num_heads_up or -1,
        "num_head_channels": adm.head_channels or -1,
        "dropout": adm.dropout,
        "class_cond": adm.num_classes > 0,
        "use_scale_shift_norm": adm.scale_shift_norm,
        "resblock_updown": adm.block_resampling,
        "use_new_attention_order": new_order,
        "learn_sigma": adm.out_channels == 2 * NUM_CHANNELS_OF_IMAGES,
    }


def process(flags: Mapping[str, Any]) -> Reverse:
    """The reverse process of flags from `read`; learn_sigma means learned_range in both packages."""
    fixed = "fixed_small" if flags["sigma_small"] else "fixed_large"
    variance = "learned_range" if flags["learn_sigma"] else fixed
    return reverse.make("x0" if flags["predict_xstart"] else "eps", variance)


def schedule(flags: Mapping[str, Any]) -> Schedule:
    """The forward process of flags from `read`, respaced. Raises a ValueError if the flags describe none."""
    name, num_steps = flags["noise_schedule"], flags["diffusion_steps"]
    if name not in ("linear", "cosine"):
        raise ValueError(f"noise_schedule={name!r} must be linear or cosine")
    try:
        whole = {"linear": schedules.linear, "cosine": schedules.cosine}[name](num_steps)
    except ValueError as error:
        raise ValueError(f"noise_schedule={name!r} with diffusion_steps={num_steps}: {error}") from error
    if flags["rescale_timesteps"]:
        whole = conditioning.on_rescaled_t(whole)
    if not flags["timestep_respacing"]:
        return whole
    return schedules.respace(whole, respacing(num_steps, flags["timestep_respacing"]))


def respacing(num_steps: int, text: str) -> list[int]:
    """The values of t in 1…T that timestep_respacing keeps.

    "10,20" cuts 1…T into equal parts and keeps 10 values of the first and 20 of the second, including the first and
    last of each part. "ddim25" keeps every n-th from t = 1, for the smallest n that keeps 25; the last may be below T.

    Raises:
        ValueError: the text is invalid, or T is too small.
    """
    refusal = ValueError(f"timestep_respacing={text!r} is impossible with diffusion_steps={num_steps}")
    try:
        counts = [int(part) for part in text.removeprefix("ddim").split(",")]
    except ValueError:
        raise ValueError(f"timestep_respacing={text!r} must be like 250, 10,20 or ddim25") from None
    if min(counts) < 0 or sum(counts) == 0:
        raise refusal
    if text.startswith("ddim"):
        for stride in range(1, num_steps):
            if len(kept := range(1, num_steps + 1, stride)) == counts[0] and len(counts) == 1:
                return list(kept)
        raise refusal
    size, longer = divmod(num_steps, len(counts))
    kept, start = set(), 1
    for part, count in enumerate(counts):
        length = size + (part < longer)
        if length < count:
            raise refusal
        # Added up as in the original code: a product could round a half to the other side.
        position, stride = 0.0, (length - 1) / (count - 1) if count > 1 else 1
        for _ in range(count):
            kept.add(start + round(position))
            position += stride
        start += length
    return sorted(kept)
