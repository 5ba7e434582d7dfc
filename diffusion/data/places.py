"""The place of files that are made from a prepared set: beside it, or in the cache if it is read-only or full."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

import tensorflow_datasets as tfds

from diffusion.runtime import files

READ_ONLY = errno.EACCES, errno.EPERM, errno.EROFS
Made = TypeVar("Made")


def of(builder: tfds.core.DatasetBuilder) -> list[Path]:
    """The directories, with the preferred one first. All processes of a user on a host share them."""
    beside = Path(builder.data_dir)
    try:
        return [beside, files.cache_directory() / "data" / builder.info.full_name.replace("/", "-")]
    except FileNotFoundError:
        return [beside]


def made(
    directories: list[Path], lock_name: str, waiting: str, make: Callable[[BinaryIO, Path], Made | None]
) -> Made | None:
    """The result of `make` in the first writable directory; None if there is none.

    Args:
        lock_name: the name of a file that one process holds at a time while the others wait.
        waiting: the message before waiting.
        make: (that file, the directory) -> the result, perhaps of another process; None without room. It renames or
            deletes the file unless it returns None.
    """
    for directory in directories:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with files.alone(directory / lock_name, waiting) as file:
                if (found := make(file, directory)) is not None:
                    return found
                Path(file.name).unlink(missing_ok=True)
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
    return None


def has_room(directory: Path, num_bytes: int) -> bool:
    """Whether the disk of a directory has this many bytes left."""
    return shutil.disk_usage(directory).free > num_bytes
