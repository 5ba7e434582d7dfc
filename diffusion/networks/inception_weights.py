"""The weights of FID's Inception: their URL, the layout of the file, and the network's parameters from it.

The published file is a PyTorch state_dict. PyTorch reads it once, without unpickling any object. The tensors are then
saved beside it as safetensors, under the published names. Later loads do not need PyTorch.
"""

import hashlib
import logging
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from diffusion.networks import pytorch_file
from diffusion.networks.named_tensors import first_few, refuse_differences
from diffusion.runtime.digests import tree_sha256
from diffusion.runtime.download import download
from diffusion.runtime.files import cache_directory, replacing

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
NUM_BYTES = 95_628_359
SUFFIX = ".safetensors"
# In the metadata of a converted file: the digests of the original file and of the tensors.
SOURCE_SHA256, TENSORS_SHA256 = "source_sha256", "tensors_sha256"
BATCH_NORM_EPS = 1e-3
UNUSED = ".num_batches_tracked"  # of a batch norm; present or absent
UNUSED_BIAS = "fc.bias"

Shape = tuple[int, ...]


def _block_35(inputs: int, pool: int) -> dict[str, Shape]:
    return {
        "branch1x1": (64, inputs, 1, 1),
        "branch5x5_1": (48, inputs, 1, 1),
        "branch5x5_2": (64, 48, 5, 5),
        "branch3x3dbl_1": (64, inputs, 1, 1),
        "branch3x3dbl_2": (96, 64, 3, 3),
        "branch3x3dbl_3": (96, 96, 3, 3),
        "branch_pool": (pool, inputs, 1, 1),
    }


def _block_17(inner: int) -> dict[str, Shape]:
    return {
        "branch1x1": (192, 768, 1, 1),
        "branch7x7_1": (inner, 768, 1, 1),
        "branch7x7_2": (inner, inner, 1, 7),
        "branch7x7_3": (192, inner, 7, 1),
        "branch7x7dbl_1": (inner, 768, 1, 1),
        "branch7x7dbl_2": (inner, inner, 7, 1),
        "branch7x7dbl_3": (inner, inner, 1, 7),
        "branch7x7dbl_4": (inner, inner, 7, 1),
        "branch7x7dbl_5": (192, inner, 1, 7),
        "branch_pool": (192, 768, 1, 1),
    }


def _block_8(inputs: int) -> dict[str, Shape]:
    return {
        "branch1x1": (320, inputs, 1, 1),
        "branch3x3_1": (384, inputs, 1, 1),
        "branch3x3_2a": (384, 384, 1, 3),
        "branch3x3_2b": (384, 384, 3, 1),
        "branch3x3dbl_1": (448, inputs, 1, 1),
        "branch3x3dbl_2": (384, 448, 3, 3),
        "branch3x3dbl_3a": (384, 384, 1, 3),
        "branch3x3dbl_3b": (384, 384, 3, 1),
        "branch_pool": (192, inputs, 1, 1),
    }


REDUCTION_17 = {
    "branch3x3": (384, 288, 3, 3),
    "branch3x3dbl_1": (64, 288, 1, 1),
    "branch3x3dbl_2": (96, 64, 3, 3),
    "branch3x3dbl_3": (96, 96, 3, 3),
}
REDUCTION_8 = {
    "branch3x3_1": (192, 768, 1, 1),
    "branch3x3_2": (320, 192, 3, 3),
    "branch7x7x3_1": (192, 768, 1, 1),
    "branch7x7x3_2": (192, 192, 1, 7),
    "branch7x7x3_3": (192, 192, 7, 1),
    "branch7x7x3_4": (192, 192, 3, 3),
}
# The shapes of the kernels in PyTorch, [outputs, inputs, height, width], of a convolution or a block's convolutions.
CONVOLUTIONS = {
    "Conv2d_1a_3x3": (32, 3, 3, 3),
    "Conv2d_2a_3x3": (32, 32, 3, 3),
    "Conv2d_2b_3x3": (64, 32, 3, 3),
    "Conv2d_3b_1x1": (80, 64, 1, 1),
    "Conv2d_4a_3x3": (192, 80, 3, 3),
    "Mixed_5b": _block_35(192, 32),
    "Mixed_5c": _block_35(256, 64),
    "Mixed_5d": _block_35(288, 64),
    "Mixed_6a": REDUCTION_17,
    "Mixed_6b": _block_17(128),
    "Mixed_6c": _block_17(160),
    "Mixed_6d": _block_17(160),
    "Mixed_6e": _block_17(192),
    "Mixed_7a": REDUCTION_8,
    "Mixed_7b": _block_8(1280),
    "Mixed_7c": _block_8(2048),
}
CLASSES, WIDTH = 1008, 2048


def layout() -> dict[str, Shape]:
    """The shape of every tensor by its published name."""
    kernels: dict[str, Shape] = {}
    for name, shape in CONVOLUTIONS.items():
        kernels |= {f"{name}.{part}": s for part, s in shape.items()} if isinstance(shape, dict) else {name: shape}
    shapes: dict[str, Shape] = {"fc.weight": (CLASSES, WIDTH), UNUSED_BIAS: (CLASSES,)}
    for name, shape in kernels.items():
        shapes[f"{name}.conv.weight"] = shape
        shapes |= {f"{name}.bn.{part}": shape[:1] for part in ("weight", "bias", "running_mean", "running_var")}
    return shapes


def published_weights() -> Path:
    """The published file in ~/.cache/diffusion ($XDG_CACHE_HOME/diffusion), downloaded if it is missing.

    If only the converted file is there, its path is returned.

    Raises:
        ValueError: the server sent something else.
        ConnectionError: the download failed.
    """
    path = cache_directory() / URL.rpartition("/")[2]
    for present in (path, converted(path)):
        if present.exists():
            return present
    try:
        download(URL, SHA256, path, NUM_BYTES)
    except OSError as error:
        raise ConnectionError(f"could not download {URL} ({error}): put a copy at {path}") from error
    return path


def converted(path: Path) -> Path:
    """The path of the safetensors converted from a PyTorch file."""
    return path.with_name(path.name + SUFFIX)


def digest(path: str | Path) -> str:
    """The SHA-256 of a file. For a converted file, the SHA-256 of the file that it was made from.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its name ends in .safetensors, but its content is something else.
    """
    path = _existing(path)
    if path.suffix == SUFFIX and (source := _metadata(path).get(SOURCE_SHA256)):
        return source
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(path: str | Path, check_digest: bool = True) -> PyTree:
    """The network's parameters from a file: the published one, the one converted from it, or another of its layout.

    Batch norms are folded into the convolutions before them.

    Args:
        path: a PyTorch state_dict, or safetensors (".safetensors") under the same names.
        check_digest: whether the weights must be the published ones.

    Returns:
        {"Conv2d_1a_3x3": {"kernel": [h, w, inputs, outputs], "bias": [outputs]}, …, "Mixed_5b": {"branch1x1": …}, …,
        "fc": [2048, 1008]}, float32.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: a PyTorch file is not converted yet, and PyTorch is not installed.
        ValueError: the weights are not the published ones, the file is damaged, or it has another layout.
    """
    path = _existing(path)
    found = digest(path)
    if check_digest and found != SHA256:
        raise ValueError(f"{path} is not the published Inception: its SHA-256 is {found}, not {SHA256}")
    if path.suffix == SUFFIX:
        return _folded(_read(path, check_digest))
    return _folded(_read_torch(path, found))


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there are no Inception weights at {path}")
    return path


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _read(path: Path, check_digest: bool) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file. With `check_digest` they must match the digest in the file."""
    wanted = _metadata(path).get(TENSORS_SHA256)
    with safe_open(path, framework="numpy") as file:
        tensors = _checked({name: file.get_tensor(name) for name in file.keys()}, path)
    if check_digest and tree_sha256(tensors) != wanted:
        raise ValueError(f"{path} is damaged: its tensors do not match their SHA-256; delete it")
    return tensors


def _read_torch(path: Path, sha256: str) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch file, from its converted file. That is made if it is absent or of another file."""
    kept = converted(path)
    if kept.is_file() and _metadata(kept).get(SOURCE_SHA256) == sha256:
        return _read(kept, check_digest=True)
    tensors = _checked(_state_dict(path), path)
    try:
        with replacing(kept) as file:
            file.write(save(tensors, {SOURCE_SHA256: sha256, TENSORS_SHA256: tree_sha256(tensors)}))
    except OSError as error:
        logging.warning("%s; PyTorch will have to read %s again", error, path.name)
    return tensors


def _state_dict(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file, read by PyTorch. Raises the errors of `pytorch_file.state_dict`."""
    remedy = "pip install -e '.[inception]', or give a .safetensors file"
    return {name: tensor.float().numpy() for name, tensor in pytorch_file.state_dict(path, remedy).items()}


def _checked(tensors: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """The tensors of the layout, float32.

    Raises:
        ValueError: a tensor is missing, extra, misshapen, not float, or has NaN or Inf; one line names the first few.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(UNUSED)}
    try:
        refuse_differences({name: t.shape for name, t in tensors.items()}, layout())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if bad := [name for name, t in tensors.items() if t.dtype.kind != "f" or not np.isfinite(t).all()]:
        raise ValueError(f"{path}: not float, NaN or Inf in {first_few(sorted(bad))}")
    return {name: np.ascontiguousarray(t, np.float32) for name, t in tensors.items()}


def _folded(tensors: dict[str, np.ndarray]) -> PyTree:
    """The network's parameters, on the device, with batch norms folded in."""
    params: PyTree = {"fc": tensors["fc.weight"].T}
    for name, shape in CONVOLUTIONS.items():
        if isinstance(shape, dict):
            params[name] = {part: _convolution(tensors, f"{name}.{part}") for part in shape}
        else:
            params[name] = _convolution(tensors, name)
    return jax.device_put(params)


def _convolution(tensors: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The kernel and bias of a convolution and the batch norm after it, computed in float64."""
    kernel = np.float64(tensors[f"{name}.conv.weight"])
    scale, bias, mean, variance = (
        np.float64(tensors[f"{name}.bn.{part}"]) for part in ("weight", "bias", "running_mean", "running_var")
    )
    factor = scale / np.sqrt(variance + BATCH_NORM_EPS)
    kernel = (kernel * factor[:, None, None, None]).transpose(2, 3, 1, 0)
    return {"kernel": np.float32(kernel), "bias": np.float32(bias - mean * factor)}
