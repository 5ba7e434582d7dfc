"""Splits whose pictures stay encoded. All are decoded once for an index file, which has their classes and digests."""

import logging
import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt64

from diffusion.data import places
from diffusion.data import tfds as prepared
from diffusion.data.content import Content
from diffusion.data.encoded import Encoded, image_digests
from diffusion.data.stored_split import Stored
from diffusion.runtime import files

CHECKED = 8  # pictures that are decoded again for a kept index

EncodedSplit = tuple[Encoded, Int32[np.ndarray, " n"] | None]


class Index(NamedTuple):
    """All that is known about a split's pictures without decoding them again. The digests are those of `Encoded`."""

    digests: UInt64[np.ndarray, " n"]
    classes: Int32[np.ndarray, " n"]
    sha256: str


def load(stored: Stored) -> EncodedSplit:
    """The pictures of a split and their classes.

    The index is a file of twelve bytes a picture. An interrupted pass over the pictures starts again. If neither the
    directory of the set nor the cache is writable, each process makes the pass.

    Raises:
        ValueError: the record files are damaged, or the pictures differ in size or have more pixel values than
            declared.
        OSError: the index could not be written.
    """
    directories, file_name = places.of(stored.builder), stored.file_name("index", "npz")
    found = (_kept(stored, directory / file_name) for directory in directories)
    if (index := next((one for one in found if one), None)) is None:
        waiting = f"waiting for another process, which reads {stored.name} {stored.split} once"
        lock_name = f"{file_name}.unfinished"
        index = places.made(directories, lock_name, waiting, lambda file, place: _made(stored, file, place))
    if index is None:
        logging.warning(
            f"no index of {stored.name} {stored.split} can be kept in {', '.join(map(str, directories))}, so this "
            "process reads all pictures once; set XDG_CACHE_HOME to a directory for it"
        )
        index = _of(stored)
    classes = index.classes if stored.has_labels else None
    known = {_content(stored).key(classes): index.sha256}
    return Encoded(stored.shape, stored.numbers, stored.reader(), index.digests, known), classes


def _content(stored: Stored) -> Content:
    return Content(stored.shape, prepared.num_levels(stored.builder), prepared.num_classes(stored.builder))


def _kept(stored: Stored, path: Path) -> Index | None:
    """The index in a file; None if it is absent, damaged, not for this user, or of other pixel values."""
    try:
        with np.load(path) as arrays:
            index = Index(arrays["digests"], arrays["classes"], str(arrays["sha256"]))
    except (FileNotFoundError, PermissionError, *files.DAMAGE):  # disk errors are raised
        return None
    is_whole = len(index.digests) == len(index.classes) == len(stored)
    return index if is_whole and _has_the_pixels(index, stored) else None


def _has_the_pixels(index: Index, stored: Stored) -> bool:
    """Whether some pictures have the digests of the index. Another version of Pillow may decode other pixel values."""
    few, picture = np.unique(np.linspace(0, len(stored) - 1, CHECKED).astype(int)), stored.reader()
    now = image_digests(picture(number) for number in stored.numbers[few].tolist())
    return np.array_equal(now, index.digests[few])


def _made(stored: Stored, lock: BinaryIO, directory: Path) -> Index:
    """Writes the index into a directory, unless another process has just done so."""
    path = directory / stored.file_name("index", "npz")
    if (index := _kept(stored, path)) is None:
        index = _of(stored)
        with files.replacing(path) as file:
            np.savez(file, **index._asdict())
    os.unlink(lock.name)
    return index


def _of(stored: Stored) -> Index:
    """Decodes all pictures."""
    content = _content(stored)
    digest, digests, classes = content.begin(), [], []
    for pixels, of_part in stored.decoded(0):
        digest.update(pixels)
        digests.append(image_digests(pixels))
        classes.append(of_part)
    all_classes = np.concatenate(classes)
    sha256 = content.end(digest, all_classes if stored.has_labels else None)
    return Index(np.concatenate(digests), all_classes, sha256)
