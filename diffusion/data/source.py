"""A data set: pixel values and labels by index, and a description that needs no reading of images."""

import dataclasses
import hashlib
import logging
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32, UInt8, UInt64
from tqdm import tqdm

from diffusion.data.content import Content
from diffusion.data.encoded import Encoded, image_digests
from diffusion.data.resizing import Resizing
from diffusion.runtime import processes
from diffusion.runtime.digests import kept_sha256

SPLITS = ("train", "test", "validation")
STORED = SPLITS[:2]  # validation images are training images that are set aside
IMAGES_PER_READ = 1000
AHEAD_BYTES = 2**36  # of pixel values, 64 GiB; larger splits are decoded ahead only on request
DECODE = ("auto", "ahead", "on_the_fly")


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set. `len(source)` is the number of its examples.

    Attributes:
        name: the name of the data set.
        split: "train", "test" or "validation".
        pixels: uint8 [N, H, W, C], pixel values 0…num_levels − 1, in memory or in a mapped file; or an object that
            decodes images on demand.
        classes: int32 [N], 0…num_classes − 1, or −1 for an unknown one; None for a set without labels.
        num_levels: the number of pixel values.
        num_classes: 0 for a set without labels.
        file: the complete file from which `pixels` is mapped; None for pixels in memory or in a file that disappears
            with this process.
        chosen: the indices of this source's examples in `pixels` and `classes`; None for all.
    """

    name: str
    split: str
    pixels: UInt8[np.ndarray, "n h w c"] | Encoded
    num_levels: int = 256
    classes: Int32[np.ndarray, " n"] | None = None
    num_classes: int = 0
    file: Path | None = None
    chosen: Int[np.ndarray, " m"] | None = None

    def __len__(self) -> int:
        return len(self.pixels if self.chosen is None else self.chosen)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""
        return self.pixels.shape[1:]

    @property
    def split_number(self) -> int:
        """A number that gives each split its own random numbers."""
        return SPLITS.index(self.split)

    def images(self, indices: Int[np.ndarray, "*b"] | slice = slice(None)) -> UInt8[np.ndarray, "*b h w c"]:
        """The pixel values of these examples, by default all. A slice is not copied unless `chosen` is set."""
        indices = self._stored(indices)
        mapping = self._mapping
        if mapping is None or isinstance(indices, slice):
            return self.pixels[indices]
        _announce(self.pixels, indices)
        chosen = self.pixels[indices]
        # The pages that were read would count as this process's memory until the system needs it.
        mapping.madvise(mmap.MADV_DONTNEED)
        return chosen

    def labels(
        self, indices: Int[np.ndarray, " b"] | slice = slice(None), complete: bool = True
    ) -> Int32[np.ndarray, " b"]:
        """The classes of these examples.

        Args:
            complete: whether an example without a class is an error. TFDS gives it the label −1.

        Raises:
            ValueError: the set has no labels, or one of these labels is outside 0…num_classes − 1.
        """
        if self.classes is None:
            raise ValueError(f"data.name={self.name!r} has no labels")
        labels = self.classes[self._stored(indices)]
        unknown = labels[(labels < 0) | (labels >= self.num_classes)]
        if complete and len(unknown):
            raise ValueError(
                f"data.name={self.name!r}: {len(unknown):,} of {len(labels):,} labels of the {self.split} split are "
                f"not in 0…{self.num_classes - 1}, for example {unknown[0]} (TFDS writes -1 for an unknown label)"
            )
        return labels

    def parts(self) -> Iterator[UInt8[np.ndarray, "n h w c"]]:
        """All images in order, IMAGES_PER_READ at a time."""
        for begin in range(0, len(self), IMAGES_PER_READ):
            yield self.images(np.arange(begin, min(begin + IMAGES_PER_READ, len(self))))

    def image_digests(self) -> UInt64[np.ndarray, " n"]:
        """A number for each image that depends on its pixel values alone."""
        if isinstance(self.pixels, Encoded):
            return self.pixels.digests[self._stored(slice(None))]
        return image_digests(image for part in self.parts() for image in part)

    @property
    def _mapping(self) -> mmap.mmap | None:
        """The memory map of the pixels; None if they are not mapped."""
        base = getattr(self.pixels, "base", None)
        return base if isinstance(base, mmap.mmap) else None

    def _stored(self, indices: Int[np.ndarray, "*b"] | slice) -> Int[np.ndarray, "*b"] | slice:
        return indices if self.chosen is None else self.chosen[indices]

    def sha256(self) -> str:
        """A digest of the split's contents: pixel values, levels and labels.

        If the pixels are in a file, the digest is computed once and kept beside the file until the file or a label
        changes. Pictures that stay encoded have the same digest.
        """
        content = Content(self.pixels.shape, self.num_levels, self.num_classes)
        key = content.key(self.classes)

        def compute() -> str:
            digest = content.begin()
            for part in self._stored_parts():
                digest.update(part)
            return content.end(digest, self.classes)

        if isinstance(self.pixels, Encoded):
            stored = self.pixels.known_sha256.get(key) or compute()
        elif self.file is None:
            stored = compute()
        else:
            stored = kept_sha256(self.file, key, compute)
        if self.chosen is None:
            return stored
        return hashlib.sha256(stored.encode() + np.ascontiguousarray(self.chosen, np.int64).tobytes()).hexdigest()

    def _stored_parts(self) -> Iterator[UInt8[np.ndarray, "n h w c"]]:
        """All stored images in order, some at a time. Pages of a mapped file do not stay in memory."""
        words = f"digest of {self.name} {self.split}"
        for begin in tqdm(range(0, len(self.pixels), IMAGES_PER_READ), desc=words, leave=False, delay=5):
            yield np.ascontiguousarray(self.pixels[begin : begin + IMAGES_PER_READ])
            if (mapping := self._mapping) is not None:
                mapping.madvise(mmap.MADV_DONTNEED)


class Splits(NamedTuple):
    """The images to train on, the images to choose by, and the images to report; the names are those of the splits."""

    train: Source
    validation: Source
    test: Source

    def sha256(self) -> dict[str, str]:
        """The digests of both stored splits, for checkpoints and results. They determine the third split."""
        return {source.split: source.sha256() for source in (self.train, self.test)}


def _announce(pixels: np.ndarray, indices: np.ndarray) -> None:
    """Asks the system to read these examples of a mapped file, all at once and nothing around them.

    Otherwise it reads them one after the other, and with each missing page its neighbours: 128 KiB, or even 8 MiB.
    """
    mapping, size = pixels.base, pixels[0].nbytes
    begin = pixels.ctypes.data - np.frombuffer(mapping, np.uint8).ctypes.data
    mapping.madvise(mmap.MADV_RANDOM)
    for index in (indices.ravel() % len(pixels)).tolist():
        first = begin + index * size
        page = first - first % mmap.PAGESIZE
        mapping.madvise(mmap.MADV_WILLNEED, page, first + size - page)
    mapping.madvise(mmap.MADV_NORMAL)  # slices are read in order


@dataclasses.dataclass(frozen=True)
class Description:
    """The description of a data set. `image_shape` is (height, width, channels)."""

    name: str
    num_train: int
    num_test: int
    image_shape: tuple[int, int, int]
    num_levels: int
    num_classes: int


def load(
    name: str, split: str, data_dir: str | None = None, image_size: int = 0, pad_to: int = 0, decode: str = "auto"
) -> Source:
    """One split of a data set, in the order of its record files.

    "digits" and "cifar10" are prepared on first use (cifar10 is downloaded); any other set must lie in
    `data_dir` as TFDS prepared it, in ArrayRecord format.

    Args:
        name: "name", "name/config" or "name:version", as TFDS writes them; without a version, the newest one.
        split: "train" or "test"; see `tfds.records` for sets that have other splits.
        data_dir: root of the TFDS directories; None or "" for TFDS's default.
        image_size, pad_to: see `resizing.Resizing`.
        decode: "ahead" keeps decoded pictures in a file, which is mapped into memory. "on_the_fly" decodes pictures
            on demand, with the same result. "auto" does the latter if there are no decoded pictures and they would
            take more than AHEAD_BYTES.

    Raises:
        FileNotFoundError: the set or one of its files is missing.
        ValueError: a malformed name, no such split, another file format than ArrayRecord, no `image` feature of
            one size with 1 or 3 channels, or a wrong checksum.
        OSError: the download failed (ConnectionError), `data_dir` cannot be written, or there is no room.
    """
    # TFDS takes a second to import, which `main.py --help` should not cost.
    from diffusion.data import decoded, index, tfds
    from diffusion.data.stored_split import Stored

    root = tfds.resolve_data_dir(data_dir)
    directory = tfds.find(name, root) or tfds.prepare(name, root)
    builder = tfds.open_directory(name, directory)
    stored = Stored(name, builder, split, Resizing(image_size, pad_to))
    is_large = decode == "auto" and stored.num_bytes > AHEAD_BYTES and decoded.kept(stored) is None
    if is_large and processes.is_first():
        logging.warning(
            f"the pixel values of {name} {split} take {stored.num_bytes / 2**30:.0f} GiB, more than "
            f"{AHEAD_BYTES >> 30}, so its pictures are decoded on the fly; data.decode=ahead keeps decoded ones"
        )
    if not len(stored):  # TFDS opens no split without files
        pixels, classes = np.empty(stored.shape, np.uint8), np.empty(0, np.int32) if stored.has_labels else None
    elif is_large or decode == "on_the_fly":
        pixels, classes = index.load(stored)
    else:
        pixels, classes = decoded.load(stored)
    file = getattr(pixels, "filename", None)  # None for a temporary file
    about = tfds.num_levels(builder), classes, tfds.num_classes(builder)
    return Source(name, split, pixels, *about, file and Path(file))


def describe(name: str, data_dir: str | None = None, image_size: int = 0, pad_to: int = 0) -> Description:
    """The description of `name`, without preparing or downloading it. Arguments and errors are those of `load`."""
    from diffusion.data import stored_split, tfds

    root, resizing = tfds.resolve_data_dir(data_dir), Resizing(image_size, pad_to)
    directory = tfds.find(name, root)
    if directory is None:
        builder = tfds.own_builder(name, root)
        if builder is None:
            raise tfds.missing(name, root)
        counts = builder.NUM_TRAIN, builder.NUM_TEST
    else:
        builder = tfds.open_directory(name, directory)
        counts = [len(tfds.records(name, builder, split)[1]) for split in STORED]
    shape = stored_split.image_shape(name, builder, resizing)
    return Description(name, *counts, shape, tfds.num_levels(builder), tfds.num_classes(builder))
