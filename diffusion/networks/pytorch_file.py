"""A PyTorch file of named tensors, read without unpickling any object, and written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


def state_dict(path: str | Path, remedy: str) -> dict[str, Any]:
    """The tensors by name, as PyTorch's.

    Args:
        remedy: what to do where PyTorch is not installed.

    Raises:
        RuntimeError: PyTorch is not installed.
        ValueError: it is no file of named tensors.
        OSError: it cannot be read.
    """
    torch = _torch(path, remedy)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(name, str) for name in state):
            raise TypeError("its keys are no names")
        return {name: tensor.detach() for name, tensor in state.items()}
    except OSError:
        raise  # no damage
    except Exception as error:  # PyTorch raises nearly anything for a file that is something else
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(f"{path} is no PyTorch state_dict: {type(error).__name__}: {reason}") from error


def write(file: BinaryIO, tensors: Mapping[str, np.ndarray], remedy: str) -> None:
    """Write arrays as tensors of these names. Raises what `state_dict` does without PyTorch."""
    torch = _torch(file.name, remedy)
    torch.save({name: torch.from_numpy(array) for name, array in tensors.items()}, file)


def _torch(path: str | Path, remedy: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise RuntimeError(f"PyTorch must read or write {path}: {remedy}") from error
    return torch
