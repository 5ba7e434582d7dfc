"""Decoded pictures: one array in a file beside the prepared set, which is mapped into memory and not read into it."""

import contextlib
import dataclasses
import errno
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

from diffusion.data import decoders, records, unfinished
from diffusion.data import tfds as prepared
from diffusion.data.folder.decoding import opened
from diffusion.data.resizing import Resizing
from diffusion.runtime import files, preemption

RECORDS_PER_READ = 1000
BYTES_PER_READ = 2**25  # of decoded pictures: 32 MiB
PROCESSES_FROM_BYTES = 2**26  # of decoded pictures: fewer are done before another process has started
READ_ONLY = errno.EACCES, errno.EPERM, errno.EROFS
Decoded = tuple[UInt8[np.ndarray, "n h w c"], Int32[np.ndarray, " n"] | None]


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
        """What was decoded before; None if it is absent, incomplete, or not for this user."""
        try:
            pixels = np.load(pixels_path, mmap_mode="r")
            classes = np.load(classes_path) if self.has_labels else None
        except (FileNotFoundError, PermissionError, ValueError, EOFError):  # an error of the disk is said
            return None
        is_whole = pixels.shape == self.shape and (classes is None or len(classes) == len(pixels))
        return (pixels, classes) if is_whole else None

    def _made(self, pixels_path: Path, classes_path: Path) -> Decoded:
        """Decodes into these files, or waits until another process has done so.

        Where that directory is read-only or too full, the pictures go into a file without a name, which ends with this
        process.
        """
        waiting = f"waiting for another process, which decodes {self.name} {self.split}"
        try:
            with files.alone(unfinished.of(pixels_path), waiting) as file:
                if (found := self._kept(pixels_path, classes_path)) is not None:
                    os.unlink(file.name)
                    return found
                if _has_room(pixels_path.parent, self._num_bytes - os.fstat(file.fileno()).st_size):
                    self._complete(file, pixels_path, classes_path)
                    return self._kept(pixels_path, classes_path)
                os.unlink(file.name)
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
        if not _has_room(temporary := Path(tempfile.gettempdir()), self._num_bytes):
            raise OSError(
                f"the decoded {self.split} pictures of data.name={self.name!r} take {self._num_bytes / 2**30:.1f} GiB, "
                f"for which there is no room in {pixels_path.parent} or {temporary}"
            )
        with tempfile.TemporaryFile() as file:
            classes: list[np.ndarray] = []
            for pixels, of_part in self._decoded(0):
                file.write(pixels.data)
                classes.append(of_part)
            file.flush()
            pixels = np.memmap(file, np.uint8, "r", shape=self.shape)
            return pixels, np.concatenate(classes) if self.has_labels else None

    def _complete(self, file: BinaryIO, pixels_path: Path, classes_path: Path) -> None:
        """Decodes what is missing in an unfinished file, and gives it its name."""
        fingerprint = pixels_path.stem[-records.FINGERPRINT_LETTERS :]
        unfinished.remove_left_over(pixels_path, self.split, fingerprint)
        made = unfinished.Unfinished(file, pixels_path, classes_path, self.shape)
        try:
            for pixels, classes in self._decoded(made.num_done):
                made.append(pixels, classes)
        except ValueError:  # damage, which a copy of the set repairs, whose records have another time
            made.discard()
            raise
        except BaseException:
            with contextlib.suppress(OSError):
                made.save()
            made.close()
            raise
        made.finish(self.has_labels)
        records.write_about(pixels_path, self.name, self.builder, self._stored)

    @property
    def _num_bytes(self) -> int:
        return int(np.prod(self.shape))

    @property
    def _image_bytes(self) -> int:
        return int(np.prod(self.shape[1:]))

    def _decoded(self, begin: int) -> Iterator[tuple[UInt8[np.ndarray, "b h w c"], Int32[np.ndarray, " b"]]]:
        """The pictures from number `begin` on and their classes, some at a time, by all cores if they are many."""
        parts, num_bytes = self._read(begin), (len(self) - begin) * self._image_bytes
        number = decoders.num_cores() if num_bytes >= PROCESSES_FROM_BYTES else 1
        words = f"decoding {self.name} {self.split}"
        with (
            tqdm(total=len(self), initial=begin, desc=words, unit=" images", leave=False) as progress,
            contextlib.closing(decoders.decoded(parts, self.resizing, self.shape[-1], number)) as decoded,
        ):
            try:
                for pictures, classes in decoded:
                    preemption.point()
                    yield self._pixels(pictures), np.array(classes, np.int32)
                    progress.update(len(pictures))
            except decoders.Undecodable as error:
                raise self._damaged(error) from error

    def __len__(self) -> int:
        return self.shape[0]

    def _read(self, begin: int) -> Iterator[decoders.Part]:
        stored, numbers = prepared.records(self.name, self.builder, self.split)
        try:
            yield from _examples(self.builder, stored, numbers[begin:], self._image_bytes)
        except OSError:
            raise
        except Exception as error:  # ArrayRecord and protobuf raise different types for garbage
            raise self._damaged(error) from error

    def _pixels(self, pictures: decoders.Pictures) -> UInt8[np.ndarray, "b h w c"]:
        """The pictures as one array, if they are what the set promises."""
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
    builder: tfds.core.DatasetBuilder, split: str, numbers: Int[np.ndarray, " n"], image_bytes: int = 1
) -> Iterator[decoders.Part]:
    """These records of a stored split as encoded pictures and classes, RECORDS_PER_READ at a time."""
    # Parsing the image and the label without their companions halves the time of reading. TFDS would decode with
    # OpenCV where that is installed, whose JPEG pixels need not be Pillow's.
    wanted = ["image", "label"] if prepared.num_classes(builder) else ["image"]
    parser = tfds.features.FeaturesDict({feature: builder.info.features[feature] for feature in wanted})
    source = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    length = max(min(RECORDS_PER_READ, BYTES_PER_READ // image_bytes), 1)
    for begin in range(0, len(numbers), length):
        chunk = source.__getitems__(numbers[begin : begin + length].tolist())
        parsed = [parser.deserialize_example_np(one, decoders={"image": tfds.decode.SkipDecoding()}) for one in chunk]
        yield [(example["image"], int(example.get("label", 0))) for example in parsed]
