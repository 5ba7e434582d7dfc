"""Decoded pictures: one array in a file beside the prepared set, which is mapped into memory and not read into it."""

import contextlib
import dataclasses
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int, Int32, UInt8
from tqdm import tqdm

from diffusion.data import records
from diffusion.data import tfds as prepared
from diffusion.data.folder.decoding import MODES, Target, opened, to_pixels
from diffusion.runtime import files

RECORDS_PER_READ = 1000
Decoded = tuple[UInt8[np.ndarray, "n h w c"], Int32[np.ndarray, " n"] | None]


@dataclasses.dataclass(frozen=True)
class Resizing:
    """The size that pictures get; without any, all of a set must have one.

    Attributes:
        image_size: the centre square of every picture is resized to so many pixels; 0: as it is.
        pad_to: black is added around every picture up to so many pixels; 0: none.
    """

    image_size: int = 0
    pad_to: int = 0

    def shape(self, name: str, stored: tuple[int, int, int]) -> tuple[int, int, int]:
        """(H, W, C) of what becomes of pictures of the shape `stored`.

        Raises:
            ValueError: the pictures are larger than `pad_to`.
        """
        height, width, channels = (self.image_size, self.image_size, stored[2]) if self.image_size else stored
        if self.pad_to and self.pad_to < max(height, width):
            raise ValueError(
                f"data.pad_to={self.pad_to} is less than the {height}×{width} pixels of data.name={name!r}; "
                "data.image_size makes pictures smaller"
            )
        return self.pad_to or height, self.pad_to or width, channels

    def pixels(self, encoded: bytes, channels: int) -> UInt8[np.ndarray, "h w c"]:
        """What becomes of an encoded picture."""
        if self.image_size:
            pixels = to_pixels(encoded, Target(self.image_size, self.image_size, channels))
        else:
            with opened(io.BytesIO(encoded), formats=None) as picture:
                pixels = np.atleast_3d(np.asarray(picture.convert(MODES[channels])))
        if not self.pad_to:
            return pixels
        missing = [self.pad_to - length for length in pixels.shape[:2]]
        return np.pad(pixels, [*((less // 2, less - less // 2) for less in missing), (0, 0)])

    def __str__(self) -> str:
        """For file names: "" without any change."""
        size, pad = (f"-{self.image_size}" if self.image_size else ""), (f"-pad{self.pad_to}" if self.pad_to else "")
        return size + pad


def image_shape(name: str, builder: tfds.core.DatasetBuilder, resizing: Resizing) -> tuple[int, int, int]:
    """(H, W, C) of every picture; of the first one where the set promises no size.

    Raises:
        ValueError: they do not fit, or have no 8 bits and 1 or 3 channels.
    """
    height, width, channels = prepared.image_shape(name, builder)
    if height is None or width is None:
        height, width = _first_size(name, builder)
    return resizing.shape(name, (height, width, channels))


def _first_size(name: str, builder: tfds.core.DatasetBuilder) -> tuple[int, int]:
    """(height, width) of the first training picture."""
    stored, numbers = prepared.records(name, builder, "train")
    [(encoded, _)] = next(_examples(builder, stored, numbers[:1]))
    with opened(io.BytesIO(encoded), formats=None) as picture:
        return picture.height, picture.width


def load(name: str, builder: tfds.core.DatasetBuilder, split: str, resizing: Resizing) -> Decoded:
    """The pixel values and the classes of a split, from files if there are some that fit the prepared data.

    Raises:
        ValueError: the record files are damaged, or the pictures have not one size or more pixel values than they say.
        OSError: no disk has room for the decoded pictures.
    """
    _, numbers = prepared.records(name, builder, split)
    shape = (len(numbers), *image_shape(name, builder, resizing))
    return _Split(name, builder, split, resizing, shape).load()


@dataclasses.dataclass(frozen=True)
class _Split:
    """What is decoded: pictures of `split` to an array of `shape`, [N, H, W, C]."""

    name: str
    builder: tfds.core.DatasetBuilder
    split: str
    resizing: Resizing
    shape: tuple[int, ...]

    @property
    def has_labels(self) -> bool:
        return prepared.num_classes(self.builder) > 0

    def load(self) -> Decoded:
        """From the files beside the set, which are made if need be.

        Their names have the sizes and times of the record files. If only the times changed, as in a copy of the set,
        the content of the record files decides whether they fit.
        """
        paths = self._paths(records.fingerprint(self.builder, self._stored))
        return self._kept(*paths) or self._renamed(*paths) or self._made(*paths)

    @property
    def _stored(self) -> str:
        return prepared.records(self.name, self.builder, self.split)[0]

    def _paths(self, fingerprint: str) -> list[Path]:
        """The files of the pictures and of the classes."""
        file_name = f"{self.split}{self.resizing}-{fingerprint}.npy"
        return [Path(self.builder.data_dir) / f"{what}-{file_name}" for what in ("decoded", "classes")]

    def _renamed(self, pixels_path: Path, classes_path: Path) -> Decoded | None:
        """What was decoded from records of this content at another time, under today's names from now on; or None."""
        sizes, sha256 = records.sizes(self.builder, self._stored), None
        for fingerprint in records.known_fingerprints(self._paths("*")[0]):
            pixels, classes = self._paths(fingerprint)
            known = records.read_about(pixels)
            if known.get("sizes") != sizes or self._kept(pixels, classes) is None:
                continue
            sha256 = sha256 or records.content_sha256(self.name, self.builder, self._stored)
            if known.get("sha256") == sha256:
                about = records.about(pixels), records.about(pixels_path)
                for old, new in ((classes, classes_path), (pixels, pixels_path), about):
                    with contextlib.suppress(OSError):  # read-only, or another process was faster
                        os.replace(old, new)
                return self._kept(pixels_path, classes_path) or self._kept(pixels, classes)
        return None

    def _kept(self, pixels_path: Path, classes_path: Path) -> Decoded | None:
        """What was decoded before; None if it is absent, unreadable or incomplete."""
        try:
            pixels = np.load(pixels_path, mmap_mode="r")
            classes = np.load(classes_path) if self.has_labels else None
        except (OSError, ValueError, EOFError):
            return None
        is_whole = pixels.shape == self.shape and (classes is None or len(classes) == len(pixels))
        return (pixels, classes) if is_whole else None

    def _made(self, pixels_path: Path, classes_path: Path) -> Decoded:
        """Decodes into these files; where the disk is read-only or full, into one that goes with this process."""
        num_bytes, temporary = int(np.prod(self.shape)), Path(tempfile.gettempdir())
        with contextlib.suppress(OSError):
            if _has_room(pixels_path.parent, num_bytes):
                with files.replacing(pixels_path) as file:
                    classes = self._decode(file)
                    if classes is not None:
                        with files.replacing(classes_path) as classes_file:
                            np.save(classes_file, classes)
                records.write_about(pixels_path, self.name, self.builder, self._stored)
                return np.load(pixels_path, mmap_mode="r"), classes
        if not _has_room(temporary, num_bytes):
            raise OSError(
                f"the decoded {self.split} pictures of data.name={self.name!r} take {num_bytes / 2**30:.1f} GiB, for "
                f"which there is no room in {pixels_path.parent} or {temporary}"
            )
        with tempfile.NamedTemporaryFile() as file:
            classes = self._decode(file)
            file.flush()
            return np.load(file.name, mmap_mode="r"), classes

    def _decode(self, file: BinaryIO) -> Int32[np.ndarray, " n"] | None:
        """Writes the pictures as a .npy file, and returns the classes. CIFAR-10's 50,000 take ten seconds on a core."""
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": self.shape})
        classes: list[int] = []
        with tqdm(total=len(self), desc=f"decoding {self.name} {self.split}", unit=" images", leave=False) as progress:
            for examples in self._read():
                file.write(self._pixels([encoded for encoded, _ in examples]).data)
                classes += [label for _, label in examples]
                progress.update(len(examples))
        return np.array(classes, np.int32) if self.has_labels else None

    def __len__(self) -> int:
        return self.shape[0]

    def _read(self) -> Iterator[list[tuple[bytes, int]]]:
        try:
            yield from _examples(self.builder, *prepared.records(self.name, self.builder, self.split))
        except OSError:
            raise
        except Exception as error:  # ArrayRecord and protobuf raise different types for garbage
            raise self._damaged(error) from error

    def _pixels(self, encoded: list[bytes]) -> UInt8[np.ndarray, "n h w c"]:
        try:
            pictures = [self.resizing.pixels(one, self.shape[-1]) for one in encoded]
        except Exception as error:  # Pillow raises different types for garbage
            raise self._damaged(error) from error
        for picture in pictures:
            if picture.shape != self.shape[1:]:
                sizes = " and of ".join(f"{height}×{width}" for height, width, _ in (self.shape[1:], picture.shape))
                raise ValueError(
                    f"data.name={self.name!r} has pictures of {sizes} pixels, but all must have one size: "
                    "set data.image_size"
                )
        pixels, num_levels = np.stack(pictures), prepared.num_levels(self.builder)
        if pixels.max() >= num_levels:
            raise ValueError(f"data.name={self.name!r} has pixel value {pixels.max()}, but only {num_levels} levels")
        return pixels

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(
            f"cannot decode the {self.split} pictures of data.name={self.name!r} ({error}): "
            f"copy or prepare {self.builder.data_dir} again"
        )


def _has_room(directory: Path, num_bytes: int) -> bool:
    return shutil.disk_usage(directory).free > num_bytes


def _examples(
    builder: tfds.core.DatasetBuilder, split: str, numbers: Int[np.ndarray, " n"]
) -> Iterator[list[tuple[bytes, int]]]:
    """These records of a stored split as encoded pictures and classes, RECORDS_PER_READ at a time."""
    # Parsing the image and the label without their companions halves the time of reading. TFDS would decode with
    # OpenCV where that is installed, whose JPEG pixels need not be Pillow's.
    wanted = ["image", "label"] if prepared.num_classes(builder) else ["image"]
    parser = tfds.features.FeaturesDict({feature: builder.info.features[feature] for feature in wanted})
    source = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    for begin in range(0, len(numbers), RECORDS_PER_READ):
        chunk = source.__getitems__(numbers[begin : begin + RECORDS_PER_READ].tolist())
        parsed = [parser.deserialize_example_np(one, decoders={"image": tfds.decode.SkipDecoding()}) for one in chunk]
        yield [(example["image"], int(example.get("label", 0))) for example in parsed]
