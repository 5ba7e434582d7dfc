"""Finds and reads the files in which diffusers publishes weights. Nothing is unpickled."""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from diffusion.networks.named_tensors import first_few, refuse_differences

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
# A directory may hold one of these instead of WEIGHTS_FILE: half precision or else a list of shards.
INDEX_FILES = (f"{WEIGHTS_FILE}.index.json", f"{WEIGHTS_FILE}.index.fp16.json")
HALF_PRECISION_FILE = "diffusion_pytorch_model.fp16.safetensors"
# The names of an attention's parts in the first published files -> the new names.
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
FLOATS = ("F32", "F16", "BF16")


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises a ValueError, without the path, if the file holds something else."""
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise ValueError("it must hold a JSON object of names and values")
    return found


class Files(NamedTuple):
    """The config of a published network, and the files that hold its weights."""

    config: Path
    weights: list[Path]


def find(directory: str | Path) -> Files:
    """The files in a network's directory, or in the folder unet/ of a pipeline's directory.

    Raises:
        FileNotFoundError: there is no config, no weights, or a shard is missing.
        ValueError: a list of shards is damaged.
    """
    folder = Path(directory)
    if not (folder / CONFIG_FILE).is_file() and (folder / "unet" / CONFIG_FILE).is_file():
        folder = folder / "unet"
    config = folder / CONFIG_FILE
    if not config.is_file():
        raise FileNotFoundError(f"{config} does not exist; {CONFIG_FILE} and {WEIGHTS_FILE} are needed")
    for name in (WEIGHTS_FILE, HALF_PRECISION_FILE):
        if (folder / name).is_file():
            return Files(config, [folder / name])
    for name in INDEX_FILES:
        if (folder / name).is_file():
            return Files(config, _shards(folder / name))
    raise FileNotFoundError(f"{folder / WEIGHTS_FILE} does not exist; {CONFIG_FILE} and {WEIGHTS_FILE} are needed")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        shards = [index.parent / Path(name).name for name in names]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: it has no weight_map of names and files") from error
    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(f"{shard} does not exist, but {index.name} names it")
    return shards


def read(paths: list[Path], expected: dict[str, Any]) -> dict[str, np.ndarray]:
    """Checks the headers and returns the tensors by their new names, float32.

    Half precision is converted with a warning.

    Args:
        paths: the file, or its shards.
        expected: name -> an object with the expected shape.

    Raises:
        ValueError: a tensor is missing, extra, in two files, misshapen, not float, or has NaN or Inf. The message names
            the first few.
    """
    tensors: dict[str, np.ndarray] = {}
    try:
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        for path in paths:
            headers = _headers(path)
            if twice := sorted(found.keys() & headers.keys()):
                raise ValueError(f"in more than one of the files: {first_few(twice)}")
            found |= headers
        refuse_differences({k: shape for k, (shape, _) in found.items()}, {k: v.shape for k, v in expected.items()})
        kinds = sorted({kind for _, kind in found.values()} - {"F32"})
        if set(kinds) - set(FLOATS):
            raise ValueError(f"the weights are {', '.join(kinds)}, not floats of 32 or 16 bits")
        for path in paths:
            tensors |= _tensors(path)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{paths[0]}: {error}") from error
    if kinds:
        logging.warning("%s holds weights in half precision (%s); converted to float32", paths[0], ", ".join(kinds))
    if bad := sorted(name for name, tensor in tensors.items() if not np.isfinite(tensor).all()):
        raise ValueError(f"{paths[0]}: NaN or Inf in {first_few(bad)}")
    return tensors


def _headers(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """The shape and the type of every tensor, by its new name."""
    with safe_open(path, framework="numpy") as file:
        slices = {name: file.get_slice(stored) for name, stored in _new_names(list(file.keys())).items()}
        return {name: (tuple(header.get_shape()), header.get_dtype()) for name, header in slices.items()}


def _tensors(path: Path) -> dict[str, np.ndarray]:
    with safe_open(path, framework="numpy") as file:
        names = _new_names(list(file.keys()))
        return {name: file.get_tensor(stored).astype(np.float32) for name, stored in names.items()}


def _new_names(stored_names: list[str]) -> dict[str, str]:
    """New name -> stored name. If a file has both names of a tensor, both are kept and the old one is extra."""
    names = {name: name for name in stored_names}
    for stored_name in stored_names:
        name = stored_name
        for old, new in OLD_NAMES.items():
            name = name.replace(old, new)
        if name not in names:
            names[name] = names.pop(stored_name)
    return names
