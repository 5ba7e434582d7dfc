"""Decoded images: one array in a file beside the prepared set, mapped into memory."""

import contextlib
import logging
import os
import tempfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Int32, UInt8

from diffusion.data import places, records, unfinished
from diffusion.data.stored_split import Stored
from diffusion.runtime import files

Decoded = tuple[UInt8[np.ndarray, "n h w c"], Int32[np.ndarray, " n"] | None]


def kept(stored: Stored) -> Decoded | None:
    """The images decoded before, from files that match the records; None without such files.

    The names of the files depend on the sizes and times of the record files. If only the times changed, as in a copy of
    the set, the content of the record files decides whether they match.
    """
    found = (_kept(stored, *_paths(stored, directory)) for directory in places.of(stored.builder))
    return next((one for one in found if one), None) or _renamed(stored)


def load(stored: Stored) -> Decoded:
    """The pixel values and the classes of a split, from files that are made if they are missing.

    If neither the directory of the set nor the cache is writable and has room, the images go into a file without a
    name, which disappears with this process.

    Raises:
        ValueError: the record files are damaged, or the pictures differ in size or have more pixel values than
            declared.
        OSError: no disk has room for the decoded pictures.
    """
    if (found := kept(stored)) is not None:
        return found
    directories = places.of(stored.builder)
    waiting = f"waiting for another process, which decodes {stored.name} {stored.split}"
    lock_name = unfinished.of(_paths(stored, stored.directory)[0]).name
    made = places.made(directories, lock_name, waiting, lambda file, directory: _made(stored, file, directory))
    return made or _temporary(stored, directories)


def _paths(stored: Stored, directory: Path, fingerprint: str = "") -> tuple[Path, Path]:
    """The files of the pictures and of the classes."""
    pixels, classes = (stored.file_name(what, "npy", fingerprint) for what in ("decoded", "classes"))
    return directory / pixels, directory / classes


def _renamed(stored: Stored) -> Decoded | None:
    """The images decoded from records of equal content with other times. Their files get today's names. Or None."""
    pixels_path, classes_path = _paths(stored, stored.directory)
    sizes, sha256 = records.sizes(stored.builder, stored.stored_split), None
    for fingerprint in records.known_fingerprints(_paths(stored, stored.directory, "*")[0]):
        pixels, classes = _paths(stored, stored.directory, fingerprint)
        known = records.read_about(pixels)
        if known.get("sizes") != sizes or _kept(stored, pixels, classes) is None:
            continue
        sha256 = sha256 or records.content_sha256(stored.name, stored.builder, stored.stored_split)
        if known.get("sha256") == sha256:
            about = records.about(pixels), records.about(pixels_path)
            for old, new in ((classes, classes_path), (pixels, pixels_path), about):
                with contextlib.suppress(OSError):  # read-only, or another process was faster
                    os.replace(old, new)
            return _kept(stored, pixels_path, classes_path) or _kept(stored, pixels, classes)
    return None


def _kept(stored: Stored, pixels_path: Path, classes_path: Path) -> Decoded | None:
    """The images decoded before; None if they are absent, incomplete, or not readable by this user."""
    try:
        pixels = np.load(pixels_path, mmap_mode="r")
        classes = np.load(classes_path) if stored.has_labels else None
    except (FileNotFoundError, PermissionError, *files.DAMAGE):  # disk errors are raised
        return None
    is_whole = pixels.shape == stored.shape and (classes is None or len(classes) == len(pixels))
    return (pixels, classes) if is_whole else None


def _made(stored: Stored, file: BinaryIO, directory: Path) -> Decoded | None:
    """Decodes into a directory, unless another process has just done so. None if there is no room."""
    paths = _paths(stored, directory)
    if (found := _kept(stored, *paths)) is not None:
        os.unlink(file.name)
        return found
    if not places.has_room(directory, stored.num_bytes - os.fstat(file.fileno()).st_size):
        return None
    if directory != stored.directory:
        logging.warning(
            f"{stored.directory} is read-only or has too little room: the decoded {stored.split} pictures go to "
            f"{paths[0]}"
        )
    _complete(stored, file, *paths)
    return _kept(stored, *paths)


def _complete(stored: Stored, file: BinaryIO, pixels_path: Path, classes_path: Path) -> None:
    """Decodes the missing images of an unfinished file, and gives it its final name."""
    unfinished.remove_left_over(pixels_path, stored.split, stored.fingerprint)
    made = unfinished.Unfinished(file, pixels_path, classes_path, stored.shape)
    try:
        for pixels, classes in stored.decoded(made.num_done):
            made.append(pixels, classes)
    except ValueError:  # damaged records: those of a repaired set have other times, so this file is useless
        made.discard()
        raise
    except BaseException:
        with contextlib.suppress(OSError):
            made.save()
        made.close()
        raise
    made.finish(stored.has_labels)
    records.write_about(pixels_path, stored.name, stored.builder, stored.stored_split)


def _temporary(stored: Stored, directories: list[Path]) -> Decoded:
    """Decodes into a file without a name. Raises an OSError if there is no room for it either."""
    temporary, size = Path(tempfile.gettempdir()), f"{stored.num_bytes / 2**30:.1f} GiB"
    looked_at = ", ".join(map(str, directories))
    if not places.has_room(temporary, stored.num_bytes):
        raise OSError(
            f"the decoded {stored.split} pictures of data.name={stored.name!r} take {size}, for which there is no "
            f"room in {looked_at} or {temporary}: data.decode=on_the_fly needs none"
        )
    logging.warning(
        f"decoding {stored.name} {stored.split} into {temporary}, {size} for this process alone: {looked_at} cannot be "
        "written or has too little room; set XDG_CACHE_HOME to a directory for it, or data.decode=on_the_fly"
    )
    with tempfile.TemporaryFile() as file:
        classes: list[np.ndarray] = []
        for pixels, of_part in stored.decoded(0):
            file.write(pixels.data)
            classes.append(of_part)
        file.flush()
        pixels = np.memmap(file, np.uint8, "r", shape=stored.shape)
        return pixels, np.concatenate(classes) if stored.has_labels else None
