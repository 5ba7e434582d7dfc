"""Reads checkpoints of hojonathanho/diffusion, the original code of Ho et al. (2020), as a `Model`.

A checkpoint is a tensor bundle of TensorFlow, PREFIX.index and PREFIX.data-00000-of-00001; TensorFlow is not needed,
and nothing is unpickled. The shapes determine the network. The process is not in the checkpoint. It comes from
kwargs.json, which the original code writes beside its checkpoints, or else from that code's default arguments.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from diffusion import reverse, schedules
from diffusion.interop import betas, tensor_bundle
from diffusion.interop.files import json_object
from diffusion.model import Model
from diffusion.networks.named_tensors import first_few, refuse_differences
from diffusion.networks.network import Network
from diffusion.networks.unet import UNet
from diffusion.runtime.files import expanded

INDEX = re.compile(r".+?(\d*)\.index")
PARTS = re.compile(r"\.(index|meta|data-\d{5}-of-\d{5})$")
KWARGS_FILE = "kwargs.json"
SCOPE, EMA = "model/", "/ExponentialMovingAverage"  # the original code scores and samples the EMA
FLOAT32 = 1  # TensorFlow's DT_FLOAT
ATTENDED = 16  # the height of the maps with attention in its networks
NUM_LEVELS = 256

# Our names inside the modules -> theirs.
PART_NAMES = {
    "norm_1": "norm1",
    "conv_1": "conv1",
    "time": "temb_proj",
    "norm_2": "norm2",
    "conv_2": "conv2",
    "shortcut": "nin_shortcut",
    "query": "q",
    "key": "k",
    "value": "v",
    "projection": "proj_out",
    "kernel": "W",
    "scale": "gamma",
}
MODULE_NAMES = {
    "time_1": "temb/dense0",
    "time_2": "temb/dense1",
    "mid_block_0": "mid/block_1",
    "mid_attention": "mid/attn_1",
    "mid_block_1": "mid/block_2",
}
# From scripts/run_cifar.py. The scripts for 256 pixels have no model_var_type: their σ² is the posterior's.
DEFAULTS = {
    "num_diffusion_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "model_mean_type": "eps",
    "model_var_type": "fixedlarge",
    "block_size": 1,
}
LEVELS_OF_256 = 6
MEANS = {"eps": "eps", "xstart": "x0"}
VARIANCES = {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small", "learned": "learned"}


def load_ho2020(path: str | Path) -> Model:
    """Loads the model of a checkpoint of hojonathanho/diffusion: the EMA of its parameters, float32.

    The process is read from kwargs.json in the same directory. Without that file it is the one of the original script
    for such a network: linear β, T = 1000, ε, and fixed_large, or fixed_small for networks with six levels.

    Args:
        path: PREFIX, such as model.ckpt-790000; one of the files PREFIX.*; or a directory, whose newest checkpoint is
            read.

    Raises:
        FileNotFoundError: there is no such checkpoint, or one of its files is missing.
        ValueError: a variable is missing, extra, misshapen, not float32, or has NaN or Inf; a `Model` cannot represent
            kwargs.json; or a file is damaged, truncated or compressed. One line names it.
    """
    prefix = find(path)
    if prefix is None:
        raise FileNotFoundError(f"{path} is not a checkpoint of hojonathanho/diffusion: PREFIX.index does not exist")
    bundle = tensor_bundle.open_bundle(prefix)
    try:
        shadows = _shadows(bundle)
        unet, names, in_channels = _network({name: entry.shape for name, entry in shadows.items()})
    except ValueError as error:
        raise ValueError(f"{prefix}.index: {error}") from error
    p, schedule = _process(prefix.with_name(KWARGS_FILE), unet, in_channels)
    tensors = tensor_bundle.read(bundle, [name + EMA for name in names.values()])
    if bad := sorted(name for name, tensor in tensors.items() if not np.isfinite(tensor).all()):
        raise ValueError(f"{prefix}: NaN or Inf in {first_few(bad)}")
    params = unflatten_dict({path: jnp.asarray(tensors[name + EMA]) for path, name in names.items()})
    denoise = jax.tree_util.Partial(Network(unet, unet.out_channels), params)
    return Model(denoise, p, schedule, NUM_LEVELS)


def find(path: str | Path) -> Path | None:
    """The prefix of a checkpoint, given by one of its files or as the newest in a directory; None if there is none."""
    root = expanded(path)
    prefix = Path(PARTS.sub("", str(root)))
    if Path(f"{prefix}.index").is_file():
        return prefix
    if not root.is_dir():
        return None
    found = [(int(match[1] or 0), file) for file in root.iterdir() if (match := INDEX.fullmatch(file.name))]
    return max(found)[1].with_suffix("") if found else None


def image_shape(model: Model) -> tuple[int | None, int | None, int]:
    """(H, W, C) of the images of a model from `load_ho2020`; H and W are None if the network takes any size."""
    unet, params = model.denoise.func.module, model.denoise.args[0]
    attended = (level for level in range(len(unet.channel_mult)) if f"down_{level}_attention_0" in params)
    size = next((ATTENDED << level for level in attended), None)
    return size, size, params["conv_in"]["kernel"].shape[2]


def _shadows(bundle: tensor_bundle.Bundle) -> dict[str, tensor_bundle.Entry]:
    """The entries of the EMA by variable name, such as model/…/W."""
    named = {name.removesuffix(EMA): entry for name, entry in bundle.entries.items() if name.endswith(EMA)}
    if not named:
        raise ValueError(f"no variable has a shadow …{EMA}; it holds {first_few(sorted(bundle.entries))}")
    if bad := sorted(f"{name} is {entry.dtype}" for name, entry in named.items() if entry.dtype != FLOAT32):
        raise ValueError(f"not float32, TensorFlow's dtype {FLOAT32}: {first_few(bad)}")
    return named


def _network(found: dict[str, tuple[int, ...]]) -> tuple[UNet, dict[tuple[str, ...], str], int]:
    """The network of these variables, the variable name of each parameter path, and the number of image channels.

    Raises:
        ValueError: the variables belong to another network, or some are missing, extra or misshapen.
    """

    def size(name: str, axis: int) -> int:
        shape = found.get(SCOPE + name, ())
        if len(shape) <= axis:
            raise ValueError(f"{SCOPE}{name} is {shape or 'missing'}")
        return shape[axis]

    def count(pattern: str) -> int:
        return len({match[0] for name in found if (match := re.match(SCOPE + pattern, name))})

    channels, in_channels, levels = size("conv_in/W", 3), size("conv_in/W", 2), count(r"down_\d+/")
    widths = [size(f"down_{level}/block_0/conv1/W", 3) for level in range(levels)]
    if channels < 1 or any(width % channels for width in widths):
        raise ValueError(f"the widths {widths} are not multiples of the {channels} channels of {SCOPE}conv_in/W")
    attended = [level for level in range(levels) if f"{SCOPE}down_{level}/attn_0/q/W" in found]
    if len(attended) > 1:
        raise ValueError(f"attention at levels {attended} cannot be represented, only where maps are 16 high")
    unet = UNet(
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        num_res_blocks=count(r"down_0/block_\d+/"),
        attention_resolutions=(ATTENDED,) if attended else (),
        out_channels=size("conv_out/W", 3),
    )
    height = ATTENDED << attended[0] if attended else 1 << max(levels - 1, 0)
    unet.check((height, height, in_channels))
    shapes = flatten_dict(_param_shapes(unet, height, in_channels))
    names = {path: _name(path) for path in shapes}
    refuse_differences(found, {names[path]: leaf.shape for path, leaf in shapes.items()})
    return unet, names, in_channels


def _param_shapes(unet: UNet, height: int, channels: int) -> PyTree:
    """The tree of the parameters' shapes; nothing is computed."""
    image = jnp.zeros((1, height, height, channels))
    return jax.eval_shape(unet.init, jax.random.key(0), image, jnp.zeros(1))["params"]


def _name(path: tuple[str, ...]) -> str:
    """The variable's name in the original code, such as model/down_1/block_0/conv1/W."""
    module, *parts = path
    module = MODULE_NAMES.get(module, module)
    module = re.sub(r"^(down|up)_(\d+)_(.*)", r"\1_\2/\3", module).replace("attention_", "attn_")
    if module.endswith(("downsample", "upsample")):
        module += "/conv"
    names = [PART_NAMES.get(part, part) for part in parts]
    if names[-1] == "bias":
        names[-1] = "beta" if "norm" in path[-2] else "b"
    return "/".join([SCOPE + module, *names])


def _process(kwargs_file: Path, unet: UNet, in_channels: int) -> tuple[reverse.Reverse, schedules.Schedule]:
    """The reverse process and the schedule from kwargs.json, or from the original defaults."""
    settings = dict(DEFAULTS)
    if len(unet.channel_mult) == LEVELS_OF_256:
        settings["model_var_type"] = "fixedsmall"
    try:
        if kwargs_file.is_file():
            given = json_object(kwargs_file)
            settings |= {key: value for key, value in given.items() if key in DEFAULTS}
        _check(settings)
        p = reverse.make(MEANS[settings["model_mean_type"]], VARIANCES[settings["model_var_type"]])
        if unet.out_channels != (wanted := p.output_channels(in_channels)):
            raise ValueError(
                f"model_var_type={settings['model_var_type']!r} needs a network of {wanted} output channels, "
                f"not {unet.out_channels}"
            )
        ends = (float(settings["beta_start"]), float(settings["beta_end"]), settings["num_diffusion_timesteps"])
        return p, schedules.from_betas(BETAS[settings["beta_schedule"]](*ends))
    except ValueError as error:  # also for malformed JSON
        raise ValueError(f"{kwargs_file}: {error}") from error


def _check(settings: Mapping[str, Any]) -> None:
    tables = {"model_mean_type": MEANS, "model_var_type": VARIANCES, "beta_schedule": BETAS}
    for key, table in tables.items():
        if settings[key] not in list(table):
            raise ValueError(f"{key}={settings[key]!r} cannot be represented, only {', '.join(table)}")
    kinds = {"num_diffusion_timesteps": (int,), "beta_start": (int, float), "beta_end": (int, float)}
    for key, kind in kinds.items():
        if type(settings[key]) not in kind or settings[key] <= 0:
            raise ValueError(f"{key}={settings[key]!r} must be a positive {'integer' if kind == (int,) else 'number'}")
    if settings["block_size"] != 1:
        raise ValueError(f"block_size={settings['block_size']!r} cannot be represented, only 1")


# beta_schedule -> β_1…β_T
BETAS = {
    "linear": betas.linear,
    "quad": betas.linear_root,
    "const": betas.constant,
    "warmup10": betas.warmup(0.1),
    "warmup50": betas.warmup(0.5),
    "jsd": betas.harmonic,
}
