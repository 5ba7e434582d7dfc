"""Reads checkpoints of OpenAI's improved-diffusion and guided-diffusion as a `Model`, and writes them.

A file holds a PyTorch state_dict. The flags of its training say what it means (`openai_flags`). Nothing is ever
unpickled.

The attention in that code has one matrix for query, key and value. The "legacy" order keeps the three of a head
together; the new order keeps all heads of the query together, then of the key, then of the value. Our network has three
matrices, so the order concerns only the file.
"""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, PyTree, Shaped

from diffusion.interop import openai_flags
from diffusion.model import Model
from diffusion.networks import pytorch_file
from diffusion.networks.adm import ADM
from diffusion.networks.named_tensors import first_few, refuse_differences
from diffusion.networks.network import Network
from diffusion.runtime.files import expanded, replacing

REMEDY = "pip install -e '.[openai]'"
NUM_LEVELS = 256

# Our names inside the modules -> theirs.
PART_NAMES = {
    "norm_1": "in_layers.0",
    "conv_1": "in_layers.2",
    "time": "emb_layers.1",
    "norm_2": "out_layers.0",
    "conv_2": "out_layers.3",
    "shortcut": "skip_connection",
    "norm": "norm",
    "projection": "proj_out",
    "kernel": "weight",
    "embedding": "weight",
    "scale": "weight",
    "bias": "bias",
}
JOINED = ("query", "key", "value")


def load_openai(pt_file: str | Path, flags: Mapping[str, Any]) -> Model:
    """Loads the model of a checkpoint of improved-diffusion or guided-diffusion, float32.

    A model with classes takes labels: `guidance.conditional(model.denoise, labels)` is a denoiser.

    Args:
        pt_file: the state_dict, such as ema_0.9999_500000.pt.
        flags: the command-line flags of its training. Add "package", improved_diffusion or guided_diffusion, if the
            flags leave that open. Absent flags have the default of that package.

    Raises:
        RuntimeError: PyTorch is not installed.
        FileNotFoundError: there is no such file.
        ValueError: an unknown flag; flags that describe another network than the file's; a tensor that is missing,
            extra, misshapen, not float, or has NaN or Inf; or another kind of file. One line names them.
    """
    whole = openai_flags.read(flags)
    schedule = openai_flags.schedule(whole)
    adm, params = load_adm(pt_file, flags)
    denoise = jax.tree_util.Partial(Network(adm, adm.out_channels), params)
    return Model(denoise, openai_flags.process(whole), schedule, NUM_LEVELS, takes_labels=adm.num_classes > 0)


def load_adm(pt_file: str | Path, flags: Mapping[str, Any]) -> tuple[ADM, PyTree]:
    """Loads the network and its float32 parameters. Arguments and errors are those of `load_openai`."""
    whole = openai_flags.read(flags)
    openai_flags.network(whole)  # invalid flags are refused before the file is read
    tensors = pytorch_file.state_dict(expanded(pt_file), REMEDY)
    labels = tensors.get("label_emb.weight")
    adm = openai_flags.network(whole, openai_flags.NUM_CLASSES if labels is None else len(labels))
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    new_order = whole.get("use_new_attention_order", False)
    try:
        _refuse_other_flags(found, adm, whole)
        shapes = _param_shapes(adm, whole["image_size"])
        expected = jax.eval_shape(partial(_to_published, adm, new_order=new_order), shapes)
        refuse_differences(found, {name: tensor.shape for name, tensor in expected.items()})
        arrays = _arrays(tensors, pt_file)
    except ValueError as error:
        raise ValueError(f"{pt_file}: {error}") from error
    return adm, _of_published(adm, shapes, arrays, new_order)


def save_openai(
    pt_file: str | Path, adm: ADM, params: PyTree, image_size: int, new_order: bool = False
) -> dict[str, Any]:
    """Writes the network and its parameters as a state_dict that guided-diffusion reads.

    improved-diffusion reads it too, unless the network has `block_resampling`, `head_channels` or the new order.

    Args:
        image_size: the height and width of its images.
        new_order: store the attention in the new order.

    Returns:
        guided-diffusion's flags of the network; the caller adds those of the diffusion process. Its command line allows
        only 1000 classes; for another number make its `UNetModel` directly.

    Raises:
        RuntimeError: PyTorch is not installed.
        ValueError: guided-diffusion cannot represent a field of `adm`, or `params` do not belong to the network.
    """
    flags = openai_flags.of_network(adm, image_size, new_order)
    shapes = _param_shapes(adm, image_size)
    refuse_differences(
        *({"/".join(path): leaf.shape for path, leaf in flatten_dict(tree).items()} for tree in (params, shapes))
    )
    tensors = _to_published(adm, params, new_order)
    with replacing(expanded(pt_file)) as file:
        pytorch_file.write(file, {name: np.array(tensor, np.float32) for name, tensor in tensors.items()}, REMEDY)
    return flags


def _param_shapes(adm: ADM, image_size: int) -> PyTree:
    """The tree of the parameters' shapes; nothing is computed."""
    image = jnp.zeros((1, image_size, image_size, openai_flags.NUM_CHANNELS_OF_IMAGES))
    return jax.eval_shape(adm.init, jax.random.key(0), image, jnp.zeros(1))["params"]


def _refuse_other_flags(found: dict[str, tuple], adm: ADM, flags: Mapping[str, Any]) -> None:
    """Raises a ValueError with the flags that the shapes in the file contradict."""
    wrong = [
        f"{flag} is {said} by the flags and {seen} in the file"
        for flag, (said, seen) in _said_and_seen(found, adm, flags).items()
        if seen not in (None, said)
    ]
    if wrong:
        raise ValueError("; ".join(wrong))


def _said_and_seen(found: dict[str, tuple], adm: ADM, flags: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Flag -> its value according to the flags, and according to the shapes in the file (None if unknown)."""

    def size(name: str, axis: int = 0) -> int | None:
        return found[name][axis] if len(found.get(name, ())) > axis else None

    levels, names = range(len(adm.widths)), [name.split(".") for name in found]
    blocks = len({parts[1] for parts in names if parts[0] == "input_blocks"})
    per_level, rest = divmod(blocks, len(levels))
    wide = "channel_mult" if flags.get("channel_mult") else "image_size"
    two, outputs = 2 * openai_flags.NUM_CHANNELS_OF_IMAGES, size("out.2.weight")
    channels, strided = size("time_embed.0.weight", 1), any("op" in parts for parts in names)
    resampled = f"input_blocks.{1 + adm.num_res_blocks}.0.in_layers.0.weight" in found  # after the first level
    pairs = {
        "num_channels": (adm.channels, channels),
        "num_res_blocks": (adm.num_res_blocks, per_level - 1 if per_level > 1 and not rest else None),
        f"{wide}, as levels,": (len(levels), blocks // (adm.num_res_blocks + 1) if rest else None),
        "class_cond": (adm.num_classes > 0, channels and "label_emb.weight" in found),
        "learn_sigma": (adm.out_channels == two, outputs and outputs == two),
        "resblock_updown": (adm.block_resampling, resampled if strided != resampled and len(levels) > 1 else None),
    }
    if any(seen not in (None, said) for said, seen in pairs.values()):
        return pairs
    firsts = [f"input_blocks.{1 + level * (adm.num_res_blocks + 1)}" for level in levels]  # of each level
    widths = [size(f"{first}.0.out_layers.0.weight") for first in firsts]
    if None in widths:  # another layout; its names make the better error message
        return pairs
    of_time = size(f"{firsts[0]}.0.emb_layers.1.weight")
    attended = [flags["image_size"] >> level for level in levels if f"{firsts[level]}.1.qkv.weight" in found]
    return pairs | {
        f"{wide}, as widths,": (adm.widths, widths),
        "use_scale_shift_norm": (adm.scale_shift_norm, of_time and of_time == 2 * widths[0]),
        "attention_resolutions": (sorted(adm.attention_resolutions, reverse=True), attended),
    }


def _arrays(tensors: dict[str, Any], pt_file: str | Path) -> dict[str, np.ndarray]:
    """PyTorch's tensors as float32 arrays; half precision is converted with a warning."""
    kinds = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    if bad := sorted(name for name, kind in kinds.items() if kind not in ("float32", "float16", "bfloat16")):
        raise ValueError(f"not floats of 32 or 16 bits: {first_few([f'{name} is {kinds[name]}' for name in bad])}")
    if halves := sorted(set(kinds.values()) - {"float32"}):
        logging.warning("%s holds weights in half precision (%s); converted to float32", pt_file, ", ".join(halves))
    arrays = {name: tensor.float().numpy() for name, tensor in tensors.items()}
    if bad := sorted(name for name, array in arrays.items() if not np.isfinite(array).all()):
        raise ValueError(f"NaN or Inf in {first_few(bad)}")
    return arrays


def _published_modules(adm: ADM, modules: PyTree) -> dict[str, str]:
    """Our module names -> theirs, including those of attentions that the network lacks."""
    names = {
        "conv_in": "input_blocks.0.0",
        "time_1": "time_embed.0",
        "time_2": "time_embed.2",
        "label": "label_emb",
        "mid_block_0": "middle_block.0",
        "mid_attention": "middle_block.1",
        "mid_block_1": "middle_block.2",
        "norm_out": "out.0",
        "conv_out": "out.2",
    }
    down, up = 1, 0  # their blocks are counted over all levels
    for level in range(len(adm.widths)):
        for i in range(adm.num_res_blocks):
            names[f"down_{level}_block_{i}"] = f"input_blocks.{down}.0"
            names[f"down_{level}_attention_{i}"] = f"input_blocks.{down}.1"
            down += 1
        names[f"down_{level}_downsample"] = f"input_blocks.{down}.0" + ("" if adm.block_resampling else ".op")
        down += 1
    for level in reversed(range(len(adm.widths))):
        for i in range(adm.num_res_blocks + 1):
            names[f"up_{level}_block_{i}"] = f"output_blocks.{up}.0"
            names[f"up_{level}_attention_{i}"] = f"output_blocks.{up}.1"
            up += 1
        place = 2 if f"up_{level}_attention_0" in modules else 1  # after the last block of the level
        names[f"up_{level}_upsample"] = f"output_blocks.{up - 1}.{place}" + ("" if adm.block_resampling else ".conv")
    return names


def _to_published(adm: ADM, params: PyTree, new_order: bool) -> dict[str, Any]:
    """The parameters by published name, with the published order of axes. It also works on shapes, under eval_shape."""
    modules = _published_modules(adm, params)
    tensors = {}
    for path, leaf in flatten_dict(params).items():
        if path[1] not in JOINED:
            tensors[_name(modules, path)] = _transposed(path, leaf)
    for module in params:
        if "query" not in params[module]:
            continue
        for part in ("kernel", "bias"):
            three = jnp.stack([jnp.transpose(params[module][name][part]) for name in JOINED])
            joined = _joined(three, _heads(adm, module, three.shape[1]), new_order)
            tensors[f"{modules[module]}.qkv.{PART_NAMES[part]}"] = joined[..., None] if part == "kernel" else joined
    return tensors


def _of_published(adm: ADM, shapes: PyTree, tensors: dict[str, np.ndarray], new_order: bool) -> PyTree:
    """The inverse of `_to_published`, for a tree of these shapes."""
    modules = _published_modules(adm, shapes)
    params = {}
    for path, leaf in flatten_dict(shapes).items():
        if path[1] in JOINED:
            joined = tensors[f"{modules[path[0]]}.qkv.{PART_NAMES[path[2]]}"]
            heads = _heads(adm, path[0], len(joined) // 3)
            own = _separated(joined, heads, new_order)[JOINED.index(path[1])]
            tensor = own[..., 0].T if path[2] == "kernel" else own
        else:
            tensor = tensors[_name(modules, path)]
            if path[-1] == "kernel" and leaf.ndim == 4:
                tensor = tensor.transpose(2, 3, 1, 0)  # OIHW -> HWIO
            elif path[-1] == "kernel":
                tensor = tensor.reshape(tensor.shape[:2]).T  # a 1x1 convolution is a matrix
        params[path] = jnp.asarray(tensor)
    return unflatten_dict(params)


def _name(modules: dict[str, str], path: tuple[str, ...]) -> str:
    return ".".join([modules[path[0]], *(PART_NAMES[part] for part in path[1:])])


def _transposed(path: tuple[str, ...], leaf: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """A kernel in PyTorch's layout. 1x1 convolutions have two more axes on maps and one more on sequences."""
    if path[-1] != "kernel":
        return leaf
    if leaf.ndim == 4:
        return leaf.transpose(3, 2, 0, 1)  # HWIO -> OIHW
    more = {"shortcut": 2, "projection": 1}.get(path[-2], 0)
    return leaf.T.reshape(*leaf.T.shape, *(1,) * more)


def _heads(adm: ADM, module: str, features: int) -> int:
    return adm.heads(features, up=module.startswith("up_"))


def _joined(three: Shaped[Array, "3 c *rest"], heads: int, new_order: bool) -> Shaped[Array, "c3 *rest"]:
    """Query, key and value as one matrix: one after another (the new order), or head by head."""
    rest = three.shape[2:]
    if not new_order:
        three = three.reshape(3, heads, -1, *rest).swapaxes(0, 1)
    return three.reshape(-1, *rest)


def _separated(joined: np.ndarray, heads: int, new_order: bool) -> np.ndarray:
    """The inverse of `_joined`: [3, c, …]."""
    if new_order:
        return joined.reshape(3, -1, *joined.shape[1:])
    split = joined.reshape(heads, 3, -1, *joined.shape[1:]).swapaxes(0, 1)
    return split.reshape(3, -1, *joined.shape[1:])
