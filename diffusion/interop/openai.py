"""Checkpoints of OpenAI's improved-diffusion and guided-diffusion: read as a `Model`, and written.

A file holds a PyTorch state_dict; what it means is in the command line that it was trained with (`openai_flags`).
Nothing is ever unpickled.

The attention of those programs has one matrix for query, key and value. Their "legacy" order has the three of a head
side by side, the new one the heads of each; our three matrices hold the heads one after another, so that the order is
of the file and not of the network.
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

# Inside the modules of `ADM` -> inside theirs.
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
    """The model of a checkpoint of improved-diffusion or guided-diffusion, float32.

    One with classes takes labels: `guidance.conditional(model.denoise, labels)` is a denoiser.

    Args:
        pt_file: the state_dict, such as ema_0.9999_500000.pt.
        flags: those of the command line that it was trained with, and "package": improved_diffusion or
            guided_diffusion, where the flags leave that open. An absent one has that program's default.

    Raises:
        RuntimeError: PyTorch is not installed.
        FileNotFoundError: there is no such file.
        ValueError: an unknown flag, flags of another network than the file's, a tensor that is missing, extra,
            misshapen, no float or not finite, or a file of something else; one line names them.
    """
    whole = openai_flags.read(flags)
    schedule = openai_flags.schedule(whole)
    adm, params = load_adm(pt_file, flags)
    denoise = jax.tree_util.Partial(Network(adm, adm.out_channels), params)
    return Model(denoise, openai_flags.process(whole), schedule, NUM_LEVELS, takes_labels=adm.num_classes > 0)


def load_adm(pt_file: str | Path, flags: Mapping[str, Any]) -> tuple[ADM, PyTree]:
    """The network and its float32 parameters. Args and errors: those of `load_openai`."""
    whole = openai_flags.read(flags)
    openai_flags.network(whole)  # what cannot be is refused before the file is read
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
    """Write the network and its parameters as a state_dict that guided-diffusion reads.

    So does improved-diffusion, unless the network has `block_resampling`, `head_channels` or the new order.

    Args:
        image_size: height and width of its images.
        new_order: of the attention.

    Returns:
        The flags of the network, as guided-diffusion takes them; those of the diffusion process are the caller's.
        Its command line knows 1000 classes; for another number its `UNetModel` must be made directly.

    Raises:
        RuntimeError: PyTorch is not installed.
        ValueError: the layout has no place for a field of `adm`, or `params` are not the network's.
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
    """What flags say of a network, and what the shapes in a file say; None where they say nothing."""

    def size(name: str, axis: int = 0) -> int | None:
        return found[name][axis] if len(found.get(name, ())) > axis else None

    levels, names = range(len(adm.widths)), [name.split(".") for name in found]
    blocks = len({parts[1] for parts in names if parts[0] == "input_blocks"})
    per_level, rest = divmod(blocks, len(levels))
    wide = "channel_mult" if flags.get("channel_mult") else "image_size"
    two, outputs = 2 * openai_flags.NUM_CHANNELS_OF_IMAGES, size("out.2.weight")
    channels, strided = size("time_embed.0.weight", 1), any("op" in parts for parts in names)
    resampled = f"input_blocks.{1 + adm.num_res_blocks}.0.in_layers.0.weight" in found  # behind the first level
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
    if None in widths:  # another layout, of which its names tell more
        return pairs
    of_time = size(f"{firsts[0]}.0.emb_layers.1.weight")
    attended = [flags["image_size"] >> level for level in levels if f"{firsts[level]}.1.qkv.weight" in found]
    return pairs | {
        f"{wide}, as widths,": (adm.widths, widths),
        "use_scale_shift_norm": (adm.scale_shift_norm, of_time and of_time == 2 * widths[0]),
        "attention_resolutions": (sorted(adm.attention_resolutions, reverse=True), attended),
    }


def _arrays(tensors: dict[str, Any], pt_file: str | Path) -> dict[str, np.ndarray]:
    """PyTorch's tensors as float32 arrays, half precision after a warning."""
    kinds = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    if bad := sorted(name for name, kind in kinds.items() if kind not in ("float32", "float16", "bfloat16")):
        raise ValueError(f"no floats of 32 or 16 bits: {first_few([f'{name} is {kinds[name]}' for name in bad])}")
    if halves := sorted(set(kinds.values()) - {"float32"}):
        logging.warning("%s holds weights in half precision (%s); converted to float32", pt_file, ", ".join(halves))
    arrays = {name: tensor.float().numpy() for name, tensor in tensors.items()}
    if bad := sorted(name for name, array in arrays.items() if not np.isfinite(array).all()):
        raise ValueError(f"NaN or Inf in {first_few(bad)}")
    return arrays


def _published_modules(adm: ADM, modules: PyTree) -> dict[str, str]:
    """The modules' names -> theirs; the names of attentions that the network has not are there, too."""
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
        place = 2 if f"up_{level}_attention_0" in modules else 1  # behind the last block of the level
        names[f"up_{level}_upsample"] = f"output_blocks.{up - 1}.{place}" + ("" if adm.block_resampling else ".conv")
    return names


def _to_published(adm: ADM, params: PyTree, new_order: bool) -> dict[str, Any]:
    """The parameters by published name, in the published order of axes; works on shapes under eval_shape."""
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
    """A kernel as PyTorch has it; 1x1 convolutions of maps have two more axes, of sequences one."""
    if path[-1] != "kernel":
        return leaf
    if leaf.ndim == 4:
        return leaf.transpose(3, 2, 0, 1)  # HWIO -> OIHW
    more = {"shortcut": 2, "projection": 1}.get(path[-2], 0)
    return leaf.T.reshape(*leaf.T.shape, *(1,) * more)


def _heads(adm: ADM, module: str, features: int) -> int:
    return adm.heads(features, up=module.startswith("up_"))


def _joined(three: Shaped[Array, "3 c *rest"], heads: int, new_order: bool) -> Shaped[Array, "c3 *rest"]:
    """Query, key and value as one: heads of each (the new order), or the three of each head."""
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
