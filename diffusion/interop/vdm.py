"""Reads checkpoints of google-research/vdm (Kingma et al., 2021) as a `Model`.

Its network is a `UNet` with one level, conditioned on γ, with the input added to the output. It also takes a number
that says whether an image was augmented. That is 0 in evaluation, so its row of the first dense layer is left out.

A checkpoint is a folder of clu, whose files ckpt-N.flax are msgpack; clu itself needs TensorFlow and is not used.
Nothing is unpickled. The config is not in the checkpoint. Shapes determine the network, and other settings have the
values of all published configs unless the caller says otherwise, or config.json beside the files or in the folder of
checkpoints-0.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, PyTree

from diffusion import reverse
from diffusion.interop import vdm_config
from diffusion.interop.vdm_config import Tensors
from diffusion.model import Model
from diffusion.networks.named_tensors import first_few, refuse_differences
from diffusion.networks.network import Network
from diffusion.networks.unet import UNet
from diffusion.runtime.files import expanded

# The names of a checkpoint's file: clu's, and those of Flax' own library.
FILE_NAME = re.compile(r"(ckpt-(\d+)\.flax|checkpoint_(\d+)(\.msgpack)?)")
FOLDERS = ("", "checkpoints-0", "checkpoints")  # clu adds the number of the process
EMA = "ema_params"  # the original code scores and samples the EMA
FOURIER = (7, 8)  # ours are 2^n·π, theirs 2^n·2π with n = 6, 7
NUM_GROUPS = 32

# Our names inside the modules -> theirs.
PART_NAMES = {
    "norm_1": "GroupNorm_0",
    "conv_1": "conv1",
    "time": "cond_proj",
    "norm_2": "GroupNorm_1",
    "conv_2": "conv2",
    "shortcut": "nin_shortcut",
    "norm": "GroupNorm_0",
    "query": "q",
    "key": "k",
    "value": "v",
    "projection": "proj_out",
}
MODULE_NAMES = {
    "conv_in": "conv_in",
    "time_1": "dense0",
    "time_2": "dense1",
    "mid_block_0": "mid.block_1",
    "mid_attention": "mid.attn_1",
    "mid_block_1": "mid.block_2",
    "norm_out": "GroupNorm_0",
    "conv_out": "conv_out",
}


@dataclasses.dataclass(frozen=True)
class AttentionEverywhere(Network):
    """A network with attention after every block, at any height of the images."""

    def __call__(self, params: PyTree, x_t: Array, network_t: Array, labels: Array | None = None) -> Array:
        """The network's output, as in `Network`."""
        module = self.module.copy(attention_resolutions=(x_t.shape[1],))
        return Network(module, self.channels)(params, x_t, network_t, labels)


def load_vdm(directory: str | Path, config: Mapping[str, Any] | None = None) -> Model:
    """Loads the model of a checkpoint of google-research/vdm: its EMA parameters, float32.

    Its pixel values are centres of bins, 255/256 times ours. That factor is the schedule's `x0_scale`, so x_t is its
    z_t. With `sm_n_timesteps` = T the schedule has T + 1 steps, because its z_0 is our x_1. If T is infinite there,
    ours is 1000. A γ that is a network is linear between these steps; for T → ∞ the bound does not depend on that.

    Args:
        directory: checkpoints-0 of a run, the folder that holds it, or a checkpoint file.
        config: `config.model` of the run; it overrides config.json in the directory. Absent keys have the values of the
            published configs.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: an unknown key; a key that contradicts the file; a tensor that is missing, extra, misshapen, not
            float32, or has NaN or Inf; or a damaged file. One line names them.
    """
    return loaded(find(directory), config)[0]


def loaded(path: Path, config: Mapping[str, Any] | None = None) -> tuple[Model, dict[str, Any]]:
    """The model of a checkpoint file, and the part of `config.model` that it determines. Errors as for `load_vdm`."""
    folders = [path.parent, *([path.parent.parent] if path.parent.name in FOLDERS else [])]
    try:
        settings = vdm_config.read(folders, config)
        tensors = _tensors(path)
        told = described(tensors)
        vdm_config.refuse_contradictions(settings, told)
        unet, params = _network(told, tensors)
        schedule = vdm_config.schedule(settings, vdm_config.gamma(told["gamma_type"], settings, tensors))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    network = AttentionEverywhere if told["with_attention"] else Network
    denoise = jax.tree_util.Partial(network(unet, unet.out_channels), params)
    return Model(denoise, reverse.make("eps", "fixed_small", "bayes"), schedule, settings["vocab_size"]), told


def find(directory: str | Path) -> Path:
    """The newest checkpoint file.

    Raises:
        FileNotFoundError: there is no checkpoint.
    """
    if found := newest(directory):
        return found
    raise FileNotFoundError(f"{expanded(directory)} holds no checkpoint of VDM's program, ckpt-N.flax")


def newest(directory: str | Path) -> Path | None:
    """The newest checkpoint file; None if there is none."""
    root = expanded(directory)
    if root.is_file():
        return root if FILE_NAME.fullmatch(root.name) else None
    for folder in (root / name for name in FOLDERS):
        if not folder.is_dir():
            continue
        found = [(match, path) for path in folder.iterdir() if (match := FILE_NAME.fullmatch(path.name))]
        if files := [(int(match[2] or match[3]), path) for match, path in found if path.is_file()]:
            return max(files)[1]
    return None


def described(tensors: Tensors) -> dict[str, Any]:
    """The part of `config.model` that the names and shapes of the tensors determine."""

    def size(name: str, axis: int) -> int:
        shape = tensors[name].shape if name in tensors else ()
        if len(shape) <= axis:
            raise ValueError(f"{name} is missing" if name not in tensors else f"{name} is {shape}")
        return shape[axis]

    channels, width = size("score_model/conv_out/kernel", 3), size("score_model/conv_in/kernel", 3)
    kinds = (kind for kind, names in vdm_config.CURVES.items() if any(f"gamma/{name}" in tensors for name in names))
    blocks = {name.split("/")[1] for name in tensors if name.startswith("score_model/down.block_")}
    return {
        "gamma_type": next(kinds, "fixed"),
        "with_fourier_features": size("score_model/conv_in/kernel", 2) != channels,
        "with_attention": any("down.attn_" in name for name in tensors),
        "sm_n_embd": width,
        "sm_n_layer": len(blocks),
    }


def _tensors(path: Path) -> dict[str, np.ndarray]:
    """The EMA parameters by their paths, a/b/c, float32."""
    try:
        state = serialization.msgpack_restore(path.read_bytes())
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"it is damaged, or not a msgpack of Flax ({type(error).__name__})") from error
    if not isinstance(state, dict) or not isinstance(state.get(EMA), dict):
        held = first_few(sorted(map(str, state))) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{EMA} is missing; the file holds {held}")
    tensors = flatten_dict(state[EMA], sep="/")
    kinds = {name: str(getattr(leaf, "dtype", type(leaf).__name__)) for name, leaf in tensors.items()}
    if bad := sorted(f"{name} is {kind}" for name, kind in kinds.items() if kind != "float32"):
        raise ValueError(f"not float32: {first_few(bad)}")
    if bad := sorted(name for name, leaf in tensors.items() if not np.isfinite(leaf).all()):
        raise ValueError(f"NaN or Inf in {first_few(bad)}")
    return tensors


def _network(told: Mapping[str, Any], tensors: Tensors) -> tuple[UNet, PyTree]:
    """The network and its parameters, after checking the names and shapes of all tensors."""
    channels = tensors["score_model/conv_out/kernel"].shape[3]
    unet = UNet(
        channels=told["sm_n_embd"],
        channel_mult=(1,),
        num_res_blocks=told["sm_n_layer"],
        attention_resolutions=(1,) if told["with_attention"] else (),  # for images of 1×1: shapes do not depend on it
        num_groups=NUM_GROUPS,
        fourier_features=FOURIER if told["with_fourier_features"] else (),
        add_input=True,
        out_channels=channels,
    )
    unet.check((1, 1, channels))
    shapes = flatten_dict(_param_shapes(unet, channels))
    expected = {_name(path): _their_shape(path, leaf.shape) for path, leaf in shapes.items() if not _has_none(path)}
    expected |= {f"gamma/{name}": shape for name, shape in vdm_config.CURVES[told["gamma_type"]].items()}
    refuse_differences({name: leaf.shape for name, leaf in tensors.items()}, expected)
    params = {}
    for path, leaf in shapes.items():
        if _has_none(path):
            tensor = np.zeros(leaf.shape, np.float32)
        elif path == ("time_1", "kernel"):
            tensor = tensors[_name(path)][:-1]
        elif path == ("conv_in", "kernel"):
            tensor = tensors[_name(path)][:, :, _in_order(leaf.shape[2], channels)]
        else:
            tensor = tensors[_name(path)]
        params[path] = jnp.asarray(tensor)
    return unet, unflatten_dict(params)


def _param_shapes(unet: UNet, channels: int) -> PyTree:
    """The tree of the parameters' shapes; nothing is computed."""
    return jax.eval_shape(unet.init, jax.random.key(0), jnp.zeros((1, 1, 1, channels)), jnp.zeros(1))["params"]


def _name(path: tuple[str, ...]) -> str:
    module, *parts = path
    for ours, theirs in {"down_0_block_": "down.block_", "up_0_block_": "up.block_"}.items():
        module = module.replace(ours, theirs)
    module = module.replace("down_0_attention_", "down.attn_").replace("up_0_attention_", "up.attn_")
    return "/".join(["score_model", MODULE_NAMES.get(module, module), *(PART_NAMES.get(part, part) for part in parts)])


def _has_none(path: tuple[str, ...]) -> bool:
    """Whether their network lacks this parameter: the bias where the embedding of γ enters a block."""
    return path[1:] == ("time", "bias")


def _their_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of their parameter: the first dense layer has one more row, for the augmentation."""
    return (shape[0] + 1, *shape[1:]) if path == ("time_1", "kernel") else shape


def _in_order(inputs: int, channels: int) -> np.ndarray:
    """The position of each input of our first convolution among theirs.

    After x, theirs are all sines and then all cosines, with the frequencies of a channel side by side. Ours are, for
    each frequency, the sines and then the cosines of all channels.
    """
    if inputs == channels:
        return np.arange(channels)
    waves = channels + np.arange(inputs - channels).reshape(2, channels, len(FOURIER))
    return np.concatenate([np.arange(channels), waves.transpose(2, 0, 1).ravel()])
