"""The start of training other than random weights: `init_from` names a run, an export or published weights."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion import interop
from diffusion.experiment import config as config_lib
from diffusion.experiment import export, named_run, names
from diffusion.experiment.combination import start_schedule
from diffusion.experiment.schema import network_keys
from diffusion.interop import ho2020, openai_flags, vdm
from diffusion.networks import NETWORKS
from diffusion.networks.named_tensors import first_few
from diffusion.reverse import VARIANCES
from diffusion.runtime import files
from diffusion.runtime.checkpoint import Checkpoints
from diffusion.runtime.digests import tree_sha256

# Fields of a network that do not affect the meaning of its weights.
WEIGHTLESS = {"dropout", "convolution", "dtype", "remat", "parent", "name"}
# Keys that determine the meaning of a network's input and output.
MEANING = ("model.network", "model.prediction", "model.variance", "model.conditioning", "model.rescale_t")
MEANING += ("schedule.num_steps",)
ENDS = "γ_1, γ_T of the schedule before training"  # by which γ is rescaled, for a network that takes γ


class Start(NamedTuple):
    """Parameters to start from, on the host, by their paths ("conv_in/kernel").

    Attributes:
        leaves: the parameters that are taken over.
        resized: those of them whose number of channels differed; they were cut or padded with zeros.
        anew: parameters of the network that the source lacks; they start as in a new run.
        unused: parameters of the source that the network does not have.
        differing: settings of the network that differ in the source.
        sha256: the digest of all parameters of the source. A run that is named without a step may train further.
    """

    leaves: dict[str, np.ndarray]
    resized: list[str]
    anew: list[str]
    unused: list[str]
    differing: list[str]
    sha256: str

    def over(self, params: PyTree) -> PyTree:
        """`params` with its leaves replaced by these."""
        whole = {"/".join(path): leaf for path, leaf in flatten_dict(params).items()} | self.leaves
        return unflatten_dict({tuple(path.split("/")): leaf for path, leaf in whole.items()})

    def described(self) -> str:
        """A one-line description of what was taken over."""
        parts = {"with other channels": self.resized, "new": self.anew, "not taken": self.unused}
        parts |= {"settings": self.differing}
        others = [f"{words}: {first_few(items)}" for words, items in parts.items() if items]
        return "; ".join([f"{len(self.leaves)} of {len(self.leaves) + len(self.anew)} parameters are taken", *others])


def load(config: ConfigDict, network: nn.Module, like: PyTree) -> Start:
    """The parameters that config.init_from names. With config.init_adapt, only those that fit.

    Args:
        network: the config's network.
        like: arrays or their shapes, in the structure of its parameters.

    Raises:
        FileNotFoundError: there is no such run, checkpoint or directory of weights.
        ValueError: they are damaged or, without config.init_adapt, belong to another network.
    """
    found, there = _read(config.init_from)
    here = _settings(network, config)
    if "data.validation" in there:  # for a run or an export; unknown for published weights
        named_run.warn_of_seen_images(
            f"init_from={config.init_from}", config.data.validation, there["data.validation"]
        )
    compared = [key for key in here if key in there and there[key] != here[key] and _matters(key, there, here)]
    differing = [f"{key}: {there[key]!r} there, {here[key]!r} here" for key in compared]
    wanted = {"/".join(path): leaf.shape for path, leaf in flatten_dict(like).items()}
    if not config.init_adapt and (problems := differing or _other_shapes(found, wanted)):
        raise ValueError(
            f"init_from={config.init_from!r} holds another network than the config's: {'; '.join(problems)}; "
            "with init_adapt=True the parameters that fit are taken"
        )
    leaves = {name: leaf for name, leaf in found.items() if wanted.get(name) == leaf.shape}
    rest = sorted(wanted.keys() & found.keys() - leaves.keys())
    resized = [name for name in rest if wanted[name] == (*found[name].shape[:-1], network.out_channels)]
    leaves |= {name: _resized(found[name], network.out_channels) for name in resized}
    anew, unused = sorted(wanted.keys() - leaves), sorted(found.keys() - leaves)
    return Start(leaves, resized, anew, unused, differing, tree_sha256(found))


def _settings(network: nn.Module, config: ConfigDict) -> dict[str, Any]:
    """The settings that distinguish networks whose parameters have the same shapes."""
    group = names.parse(config.model.network).name
    fields = {field.name for field in dataclasses.fields(network)} - WEIGHTLESS
    flat, of_network = config_lib.flatten(config), {f"{group}.{field}": getattr(network, field) for field in fields}
    return dict(sorted(of_network.items())) | {key: flat[key] for key in MEANING} | _ends(config)


def _ends(config: ConfigDict) -> dict[str, Any]:
    """The ends of γ, if the network is conditioned on it; other ends give the same noise another number."""
    if config.model.conditioning != "gamma":
        return {}
    log_snr = np.asarray(start_schedule(config)[0].log_snr, np.float64)
    return {ENDS: tuple((-log_snr[[1, -1]]).round(3).tolist())}


def _read(text: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The parameters by their paths, and the known settings of their network."""
    directory = files.expanded(text)
    places = (directory, files.expanded(text.rpartition("@")[0] or text))
    if not any(place.exists() for place in places) and ho2020.find(text) is None:
        words = "may be a run (DIR, DIR@best, DIR@STEP), an export or published weights"
        raise FileNotFoundError(f"init_from={text!r} does not exist; it {words}")
    if found := vdm.newest(directory):
        raise ValueError(
            f"init_from={text!r} is a checkpoint of VDM's code ({found.name}), whose pixel values are 255/256 times "
            "those of a run; interop.load_vdm reads it, and python -m experiments.published scores it"
        )
    if _is_run(text):
        return _of_run(text)
    if export.is_export(directory):
        about = export.read(directory)
        return export.read_params(directory, about), _all_settings(about.config)
    return _published(text)


def _is_run(text: str) -> bool:
    directory = text.rpartition("@")[0] or text
    return any((files.expanded(path) / "checkpoints").is_dir() for path in (text, directory))


def _of_run(text: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The EMA of a run, and its settings."""
    run = named_run.parse(text, "init_from")
    with Checkpoints(run.checkpoints) as checkpoints:
        found = checkpoints.entry(run.step(checkpoints), "ema_params")
    return found, _all_settings(config_lib.read(run.directory / "config.json"))


def _all_settings(config: ConfigDict) -> dict[str, Any]:
    """Every key, with the fields of the network that are arguments of its name or that the config leaves out."""
    flat = config_lib.flatten(config)
    group, arguments = names.parse(flat["model.network"])
    defaults = {name: key.when_absent for name, key in network_keys().items() if name.startswith(f"{group}.")}
    return defaults | flat | {f"{group}.{name}": value for name, value in arguments.items()} | _ends(config)


def _published(path: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads a diffusers directory, OpenAI's FILE.pt with its flags in FILE.json, or Ho et al.'s PREFIX."""
    if ho2020.find(path) is not None:
        model = interop.load_ho2020(path)
        network, params = model.denoise.func.module, model.denoise.args[0]
        there = {"model.prediction": model.p.prediction, "model.variance": model.p.variance}
        there |= {"model.conditioning": "t", "model.rescale_t": False, "schedule.num_steps": model.schedule.num_steps}
    elif path.endswith(".pt"):
        flags = openai_flags.beside(path)
        network, params = interop.load_adm(path, flags)
        p = openai_flags.process(flags)
        there = {"model.prediction": p.prediction, "model.variance": p.variance, "model.conditioning": "t"}
        there |= {"model.rescale_t": flags["rescale_timesteps"], "schedule.num_steps": flags["diffusion_steps"]}
    else:
        (network, params), there = interop.load_diffusers(path), {}
    group = next(name for name, module in NETWORKS.items() if type(network) is module)
    found = {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(params).items()}
    fields = {f"{group}.{field.name}": getattr(network, field.name) for field in dataclasses.fields(network)}
    return found, fields | there


def _matters(key: str, there: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether another value of this setting gives the same parameters another meaning."""
    if key == "model.variance":  # fixed ones do not affect the network's output
        return all(VARIANCES[of[key]].is_learned for of in (there, here))
    if key == "schedule.num_steps":  # the range of t that the network is conditioned on
        return here["model.conditioning"] == "t" and not here["model.rescale_t"]
    return True


def _other_shapes(found: dict[str, np.ndarray], wanted: dict[str, tuple]) -> list[str]:
    """The parameters that only one of them has, or that have two shapes."""
    shapes = {name: leaf.shape for name, leaf in found.items()}
    differ = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
    named = [f"{name} {shapes.get(name, 'not')} there, {wanted.get(name, 'not')} here" for name in differ]
    return [first_few(named)] if named else []


def _resized(leaf: np.ndarray, out_channels: int) -> np.ndarray:
    """The last layer with another number of channels: it is cut, or padded with zeros.

    The first half is the prediction, the second the variance. So with a trained mean, a new learned variance starts in
    the middle of its range.
    """
    made = np.zeros((*leaf.shape[:-1], out_channels), leaf.dtype)
    kept = min(leaf.shape[-1], out_channels)
    made[..., :kept] = leaf[..., :kept]
    return made
