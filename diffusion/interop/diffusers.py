"""Reads and writes DDPM weights in the layout of diffusers' UNet2DModel.

A directory holds `config.json` and `diffusion_pytorch_model.safetensors`. `UNet` represents only the settings that
Ho et al. (2020) used; others are refused by name. Nothing is ever unpickled.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree
from safetensors.numpy import save_file

from diffusion import learned_schedule
from diffusion.interop import files
from diffusion.interop.files import CONFIG_FILE, WEIGHTS_FILE
from diffusion.networks.named_tensors import refuse_differences
from diffusion.networks.unet import UNet

# The values in config.json that make the network Ho et al.'s.
FIXED_CONFIG = {
    "_class_name": "UNet2DModel",
    "act_fn": "silu",
    "add_attention": True,
    "attention_head_dim": None,  # one head
    "attn_norm_num_groups": None,  # as many as norm_num_groups
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_padding": 0,  # at the bottom and right only
    "downsample_type": "conv",
    "flip_sin_to_cos": False,  # sines first
    "freq_shift": 1,  # the frequencies divide by width/2 - 1
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2D",
    "resnet_time_scale_shift": "default",  # the time embedding is added
    "time_embedding_dim": None,  # 4 * the first width
    "time_embedding_type": "positional",
    "upsample_type": "conv",
}
# The values of absent keys in diffusers, where they matter.
ABSENT_CONFIG = {
    "attention_head_dim": 8,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_eps": 1e-5,
}
# Required keys whose values are free: sizes, which are integers or lists of them, and types of blocks.
SIZES = {"sample_size", "in_channels", "out_channels"}
SIZES |= {"block_out_channels", "layers_per_block", "norm_num_groups"}
BLOCK_TYPES = {"down_block_types", "up_block_types"}
# Optional keys. This kind of time embedding does not use num_train_timesteps.
OPTIONAL = {"dropout", "norm_eps", "num_class_embeds", "num_train_timesteps"}

# Our names inside the modules -> the published ones.
PART_NAMES = {
    "norm_1": "norm1",
    "conv_1": "conv1",
    "time": "time_emb_proj",
    "norm_2": "norm2",
    "conv_2": "conv2",
    "shortcut": "conv_shortcut",
    "norm": "group_norm",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "projection": "to_out.0",
    "kernel": "weight",
    "embedding": "weight",
    "scale": "weight",
    "bias": "bias",
}


def load_diffusers(directory: str | Path) -> tuple[UNet, PyTree]:
    """Loads the network and its float32 parameters from a directory with published weights.

    Raises:
        FileNotFoundError: one of the files does not exist.
        ValueError: `UNet` cannot represent the config, or a tensor is missing, extra, misshapen, not float, or has NaN
            or Inf. The message names the first few.
    """
    config, weights = files.find(directory)
    try:
        unet, image_shape = _unet_of(files.json_object(config))
    except ValueError as error:  # also for malformed JSON
        raise ValueError(f"{config}: {error}") from error
    shapes = _param_shapes(unet, image_shape)
    tensors = files.read(weights, expected=jax.eval_shape(partial(_to_published, unet), shapes))

    params = {}
    for path in flatten_dict(shapes):
        name = _published_name(unet, path)
        tensor = tensors[name]
        if name.endswith("conv_shortcut.weight"):
            tensor = tensor[:, :, 0, 0]
        if path[-1] == "kernel":
            tensor = tensor.transpose({2: (1, 0), 4: (2, 3, 1, 0)}[tensor.ndim])  # OIHW -> HWIO
        params[path] = jnp.asarray(tensor)
    return unet, unflatten_dict(params)


def save_diffusers(directory: str | Path, unet: nn.Module, params: PyTree, sample_size: int) -> None:
    """Writes the network and its parameters as published weights, for images of sample_size x sample_size.

    Raises:
        ValueError: the layout cannot represent the network or one of its fields, or `params` belong to another one.
    """
    if problem := _without_place(unet, params):
        raise ValueError(f"{problem}; --mode=export saves any model of this project (docs/python.md)")
    image_shape = (sample_size, sample_size, params["conv_in"]["kernel"].shape[2])
    refuse_differences(
        *(
            {"/".join(path): leaf.shape for path, leaf in flatten_dict(tree).items()}
            for tree in (params, _param_shapes(unet, image_shape))
        )
    )
    attends = [sample_size >> level in unet.attention_resolutions for level in range(len(unet.channel_mult))]
    config = FIXED_CONFIG | {
        "sample_size": sample_size,
        "in_channels": image_shape[2],
        "out_channels": unet.out_channels,
        "block_out_channels": [unet.channels * factor for factor in unet.channel_mult],
        "layers_per_block": unet.num_res_blocks,
        "norm_num_groups": unet.num_groups,
        "norm_eps": unet.norm_eps,
        "dropout": unet.dropout,
        "num_class_embeds": unet.num_classes or None,
        **_block_types(attends),
    }
    tensors = {name: np.asarray(tensor, order="C") for name, tensor in _to_published(unet, params).items()}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def _unet_of(config: dict[str, Any]) -> tuple[UNet, tuple[int, int, int]]:
    """The network that a published config describes, and the shape [H, W, C] of its images."""
    for key, value in (ABSENT_CONFIG | config).items():
        if key in FIXED_CONFIG and value != FIXED_CONFIG[key]:
            raise ValueError(f"{key}={value!r} cannot be represented, only {FIXED_CONFIG[key]!r}.")
        if key not in FIXED_CONFIG.keys() | SIZES | BLOCK_TYPES | OPTIONAL and not key.startswith("_"):
            raise ValueError(f"{key}={value!r} is not a key of this kind of network.")
    if missing := (SIZES | BLOCK_TYPES) - config.keys():
        raise ValueError(f"{', '.join(sorted(missing))} must be given.")
    sizes = SIZES | {"num_class_embeds"} if config.get("num_class_embeds") is not None else SIZES
    for key in sorted(sizes):
        if not all(type(size) is int and size > 0 for size in np.ravel(np.array(config[key], dtype=object))):
            raise ValueError(f"{key}={config[key]!r} must consist of positive integers.")

    norm_eps = config.get("norm_eps", ABSENT_CONFIG["norm_eps"])
    if type(norm_eps) is not float or not 0 < norm_eps < 1:
        raise ValueError(f"norm_eps={norm_eps!r} must be a number in (0, 1).")

    height, width = np.broadcast_to(config["sample_size"], 2).tolist()
    widths = config["block_out_channels"]
    attends = [block_type == "AttnDownBlock2D" for block_type in config["down_block_types"]]
    if any(features % widths[0] for features in widths):
        raise ValueError(f"block_out_channels={widths} must be multiples of the first.")
    for key, block_types in _block_types(attends).items():
        if config[key] != block_types or len(block_types) != len(widths):
            raise ValueError(
                f"{key}={config[key]} cannot be represented; there must be one DownBlock2D or "
                f"AttnDownBlock2D per width of block_out_channels={widths} and, in reverse, its UpBlock2D "
                "or AttnUpBlock2D."
            )
    unet = UNet(
        channels=widths[0],
        channel_mult=tuple(features // widths[0] for features in widths),
        num_res_blocks=config["layers_per_block"],
        attention_resolutions=tuple(height >> level for level, attend in enumerate(attends) if attend),
        num_groups=config["norm_num_groups"],
        norm_eps=norm_eps,
        dropout=config.get("dropout", 0.0),
        num_classes=config.get("num_class_embeds") or 0,
        out_channels=config["out_channels"],
    )
    image_shape = (height, width, config["in_channels"])
    unet.check(image_shape)
    return unet, image_shape


def _without_place(unet: nn.Module, params: PyTree) -> str:
    """Why the published layout cannot hold the network; "" if it can."""
    if not isinstance(unet, UNet):
        return f"a {type(unet).__name__} has no place in the published layout, which needs a UNet"
    needed = {"scale_shift_norm": False, "fourier_features": (), "wiener": (), "num_heads": 1}
    needed |= {"add_input": False, "mid_attention": True, "patch_size": 1}
    for key, value in needed.items():
        if getattr(unet, key) != value:
            return f"unet.{key}={getattr(unet, key)} has no place in the published layout, which needs {value}"
    if unet.channel_mult[0] != 1:
        return f"unet.channel_mult={unet.channel_mult} must begin with 1 in the published layout"
    if learned_schedule.SUBTREE in params:
        return "a learned schedule has no place in the published layout"
    return ""


def _block_types(attends: list[bool]) -> dict[str, list[str]]:
    """The two lists of block types of a network whose i-th level has attention if `attends[i]`."""
    return {
        "down_block_types": ["AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        "up_block_types": ["AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
    }


def _param_shapes(unet: UNet, image_shape: tuple[int, int, int]) -> PyTree:
    """The tree of the parameters' shapes; nothing is computed."""
    variables = jax.eval_shape(unet.init, jax.random.key(0), jnp.zeros((1, *image_shape)), jnp.zeros(1))
    return variables["params"]


def _published_name(unet: UNet, path: tuple[str, ...]) -> str:
    """The published name of the parameter at `path` of the network's tree."""
    modules = {
        "conv_in": "conv_in",
        "time_1": "time_embedding.linear_1",
        "time_2": "time_embedding.linear_2",
        "label": "class_embedding",
        "mid_block_0": "mid_block.resnets.0",
        "mid_attention": "mid_block.attentions.0",
        "mid_block_1": "mid_block.resnets.1",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    }
    for level in range(len(unet.channel_mult)):
        # Published levels are counted in the order in which they run.
        down, up = f"down_blocks.{level}", f"up_blocks.{len(unet.channel_mult) - 1 - level}"
        modules[f"down_{level}_downsample"] = f"{down}.downsamplers.0.conv"
        modules[f"up_{level}_upsample"] = f"{up}.upsamplers.0.conv"
        for i in range(unet.num_res_blocks + 1):
            modules[f"down_{level}_block_{i}"] = f"{down}.resnets.{i}"
            modules[f"up_{level}_block_{i}"] = f"{up}.resnets.{i}"
            modules[f"down_{level}_attention_{i}"] = f"{down}.attentions.{i}"
            modules[f"up_{level}_attention_{i}"] = f"{up}.attentions.{i}"
    return ".".join([modules[path[0]], *(PART_NAMES[part] for part in path[1:])])


def _to_published(unet: UNet, params: PyTree) -> dict[str, Any]:
    """The parameters by published name, with the published order of axes. It also works on shapes, under eval_shape."""
    tensors = {}
    for path, tensor in flatten_dict(params).items():
        name = _published_name(unet, path)
        if path[-1] == "kernel":
            tensor = tensor.transpose({2: (1, 0), 4: (3, 2, 0, 1)}[tensor.ndim])  # HWIO -> OIHW
        if name.endswith("conv_shortcut.weight"):
            tensor = tensor[:, :, None, None]  # published as a 1x1 convolution
        tensors[name] = tensor
    return tensors
