"""An export: a trained model as two files, which need neither its run nor its data set.

`model.safetensors` holds the EMA parameters, float32, by their paths ("conv_in/kernel"). `model.json` holds the rest of
the `Model`, and information for a reader: config, step, digests, scores. Nothing is pickled.
"""

import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from diffusion import __version__
from diffusion.experiment import config as config_lib
from diffusion.experiment.constraints import TEXT, Constraint, integer
from diffusion.experiment.schema import all_keys
from diffusion.networks.named_tensors import first_few, refuse_differences
from diffusion.reporting.summary import read_json
from diffusion.runtime import files
from diffusion.runtime.digests import tree_sha256

WEIGHTS, ABOUT = "model.safetensors", "model.json"
FORMAT = 1  # of model.json; it increases if an older version would misread the file
# Keys with paths on the machine that trained the model, and their values in an export.
PLACES = {"data.data_dir": "", "init_from": "", "init_adapt": False}
NO_GUIDE = {"sample.guide": "", "sample.guidance": 0.0, "sample.guidance_interval": ()}
# The entries of summary.json and eval.json that are neither scores nor their protocol.
NO_SCORES = {"step", "num_params", "params_sha256", "ema_sha256", "data_sha256", "seconds", "forked_from"}
NO_SCORES |= {"stopped_early", "started_from"}


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(type(size) is int and size > 0 for size in value)


# The entries of model.json that the parameters and the config do not determine.
ENTRIES = {
    "image_shape": Constraint(_is_shape, "three integers above 0"),
    "num_levels": integer(2),
    "num_classes": integer(0),
    "step": integer(0),
    "ema_sha256": TEXT,
}


class Export(NamedTuple):
    """The contents of `model.json`.

    Attributes:
        config: the config of the run.
        image_shape: (H, W, C).
        num_levels: the number of pixel values.
        num_classes: the number of classes of the network's labels; 0 for a network without labels.
        step: the number of optimizer steps taken.
        ema_sha256: the digest of the parameters.
    """

    config: ConfigDict
    image_shape: tuple[int, int, int]
    num_levels: int
    num_classes: int
    step: int
    ema_sha256: str


def is_export(directory: Path) -> bool:
    """Whether a directory holds an export, complete or not, and neither a run nor published weights."""
    has_one = any((directory / name).is_file() for name in (WEIGHTS, ABOUT))
    return has_one and not (directory / "config.json").exists()


def write(directory: Path, about: Export, params: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    """Writes both files, or neither. The same arguments give the same bytes.

    Args:
        params: the parameters by their paths.
        facts: more entries of `model.json`.

    Raises:
        ValueError: a parameter is NaN, Inf or not float32, or `directory` holds something else, which is not deleted.
        OSError: a file could not be written.
    """
    _check_numbers(directory / WEIGHTS, params)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; export to another one")
    if (directory / "config.json").exists():
        raise ValueError(f"{directory} holds a run or published weights (config.json); export to another directory")
    config = json.loads(config_lib.to_json(_without_places(about.config)))
    said = {"format": FORMAT, "version": config.pop(config_lib.VERSION)} | facts
    said |= {name: getattr(about, name) for name in ENTRIES}
    said |= {"num_params": sum(leaf.size for leaf in params.values()), "config": config}
    text = json.dumps(said, indent=2, allow_nan=False) + "\n"
    tensors = {name: np.asarray(leaf, order="C") for name, leaf in params.items()}  # safetensors assumes this order
    contents = {WEIGHTS: save(tensors), ABOUT: text.encode()}
    for name, content in contents.items():
        path = directory / name
        if path.exists() and path.read_bytes() != content:
            raise ValueError(f"{path} exists and differs from this export's; delete it or export to another directory")
    directory.mkdir(parents=True, exist_ok=True)
    absent = [directory / name for name in contents if not (directory / name).exists()]
    try:
        for name, content in contents.items():  # model.json comes last: without it the weights are not an export
            with files.replacing(directory / name) as file:
                file.write(content)
    except OSError:
        for path in absent:
            path.unlink(missing_ok=True)
        raise


def read(directory: Path) -> Export:
    """Reads `model.json`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or a later version wrote it.
    """
    path = directory / ABOUT
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; an export is {ABOUT} and {WEIGHTS}")
    try:
        return _parsed(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_params(
    directory: Path, about: Export, shapes: dict[str, tuple[int, ...]] | None = None
) -> dict[str, np.ndarray]:
    """Reads the parameters by their paths, bit-identical to the exported ones.

    Args:
        shapes: the required shapes; the error message names the first that differs.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or belongs to another model.
    """
    path = directory / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; an export is {ABOUT} and {WEIGHTS}")
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            if shapes is not None:
                refuse_differences({name: tuple(of.get_shape()) for name, of in slices.items()}, shapes)
            if kinds := {of.get_dtype() for of in slices.values()} - {"F32"}:
                raise ValueError(f"the parameters are {', '.join(sorted(kinds))}, not F32")
            params = {name: file.get_tensor(name) for name in slices}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    _check_numbers(path, params)
    if (found := tree_sha256(params)) != about.ema_sha256:
        digests = f"SHA-256 {found[:12]}, and {about.ema_sha256[:12]} there"
        raise ValueError(f"{path} is damaged or another model's: it does not hold what {ABOUT} says ({digests})")
    return params


def scores_in(directory: Path, ema_sha256: str) -> dict[str, Any]:
    """The scores of these parameters in a run's directory, and their protocol; {} if there are none."""
    patterns = ("summary.json", "summary_*.json", "eval.json", "evaluations/*/eval.json")
    for path in (path for pattern in patterns for path in sorted(directory.glob(pattern))):
        found = read_json(path) or {}
        if found.get("ema_sha256") == ema_sha256 and "test_bpd" in found:
            return {name: value for name, value in found.items() if name not in NO_SCORES}
    return {}


def command_in(directory: Path, config: ConfigDict) -> str:
    """The command of the run in a directory: its config file as it was then, and the keys that differ from it.

    It is "" if the run does not record its config file. The path of the data is left out. A run or weights from which
    this run started appear with the last part of their path.
    """
    base = read_json(directory / "base.json") or {}
    if not isinstance(base.get("values"), dict):
        return ""
    then = {name: key.default for name, key in all_keys().items()} | flatten_dict(base["values"], sep=".")
    now = config_lib.flatten(config)
    now |= {name: Path(now[name]).name for name in ("init_from", "sample.guide")}
    changed = [name for name in now if name != "data.data_dir" and json.dumps(now[name]) != json.dumps(then.get(name))]
    given = [f"--config.{name}={now[name]}" for name in sorted(changed)]
    if origin := read_json(directory / "fork.json"):
        given.append(f"--fork={Path(origin['directory']).name}@{origin['step']}")
    return shlex.join(["python", "main.py", f"--config={base.get('config')}", *given])


def _without_places(config: ConfigDict) -> ConfigDict:
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.update_from_flattened_dict(PLACES | (NO_GUIDE if config.sample.guide else {}))
    return config


def _parsed(text: bytes) -> Export:
    """The contents of a `model.json`. Raises a ValueError with the problem, without the file's name."""
    try:
        said = json.loads(text)
    except ValueError:
        said = None
    if not isinstance(said, dict) or not isinstance(said.get("config"), dict):
        raise ValueError("is damaged: it is not the JSON of an export")
    version = said.get("version")
    if said.get("format") != FORMAT:
        words = f"has format={said.get('format')!r}, and version {__version__} reads format {FORMAT}"
        raise ValueError(f"{words}; version {version} wrote it")
    values = {name: tuple(value) if isinstance(value := said.get(name), list) else value for name in ENTRIES}
    for name, value in values.items():
        if problem := ENTRIES[name].problem(value):
            raise ValueError(f"{name} {problem}")
    config = config_lib.from_json(json.dumps({config_lib.VERSION: version} | said["config"]))
    config_lib.check(config)
    return Export(config, **values)


def _check_numbers(path: Path, params: dict[str, np.ndarray]) -> None:
    if other := sorted(name for name, leaf in params.items() if leaf.dtype != np.float32):
        raise ValueError(f"{path}: not float32: {first_few(other)}")
    if bad := sorted(name for name, leaf in params.items() if not np.isfinite(leaf).all()):
        raise ValueError(f"{path}: NaN or Inf in {first_few(bad)}")
