"""Reads a PyTorch file of named tensors, without unpickling any object, and writes one."""

import logging
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from diffusion.networks.named_tensors import first_few

ZIP_START = b"PK\3\4"
CHUNK = 1 << 20  # bytes that are read at a time


def state_dict(path: str | Path, remedy: str) -> dict[str, Any]:
    """The tensors in a file by name, as PyTorch tensors.

    Args:
        remedy: advice in the error message if PyTorch is not installed.

    Raises:
        RuntimeError: PyTorch is not installed.
        ValueError: the file is damaged, or does not hold named tensors.
        OSError: the file cannot be read.
    """
    torch = _torch(path, remedy)
    _refuse_damage(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise  # the file is not damaged
    except Exception as error:  # PyTorch raises almost any error for other kinds of files
        raise ValueError(f"{path} {_what_is_wrong(path, error)}") from error
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path} is not a PyTorch state_dict: it has no names")
    if others := sorted(name for name, held in state.items() if not hasattr(held, "detach")):
        raise ValueError(f"{path} is not a PyTorch state_dict: these are not tensors: {first_few(others)}")
    return {name: tensor.detach() for name, tensor in state.items()}


def write(file: BinaryIO, tensors: Mapping[str, np.ndarray], remedy: str) -> None:
    """Writes arrays as tensors of these names. Raises a RuntimeError if PyTorch is not installed."""
    torch = _torch(file.name, remedy)
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, file)


def _refuse_damage(path: str | Path) -> None:
    """Raises a ValueError that names the records with a wrong CRC-32.

    PyTorch does not check it: it is built with MINIZ_DISABLE_ZIP_READER_CRC32_CHECKS. Files from before PyTorch 1.6 are
    not archives and have no CRC-32.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            records = [record for record in archive.infolist() if record.file_size]
            bad = [record.filename for record in records if not _is_whole(archive, record)]
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if bad and len(bad) == len(records):  # torch.serialization.set_crc32_options(False)
        logging.warning("%s was written without checksums, so damage is not noticed", path)
    elif bad:
        raise ValueError(f"{path} is damaged: wrong CRC-32 of {first_few(bad)}")


def _is_whole(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bool:
    if record.header_offset < 0:
        return False
    try:
        with archive.open(record) as file:
            while file.read(CHUNK):
                pass
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError):  # also NotImplementedError, a RuntimeError
        return False
    return True


def _what_is_wrong(path: str | Path, error: Exception) -> str:
    """Why PyTorch refuses a file. PyTorch's advice to read it without `weights_only` is never repeated."""
    with open(path, "rb") as file:
        start = file.read(len(ZIP_START))
    if not start:
        return "is empty"
    if start == ZIP_START and not zipfile.is_zipfile(path):
        return "is damaged: it is truncated"
    if isinstance(error, pickle.UnpicklingError):
        return "is not a PyTorch state_dict: it does not hold only tensors"
    reason = next(iter(str(error).splitlines()), "")
    return f"is not a PyTorch state_dict: {type(error).__name__}: {reason}"


def _torch(path: str | Path, remedy: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise RuntimeError(f"PyTorch is needed for {path}: {remedy}") from error
    return torch
