"""A split of a prepared set in the size that the config names: its pictures in order, or one by one."""

import contextlib
import dataclasses
import errno
import functools
import io
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int, Int32, UInt8
from PIL import UnidentifiedImageError
from tqdm import tqdm

from diffusion.data import decoders, records
from diffusion.data import tfds as prepared
from diffusion.data.folder import metadata
from diffusion.data.folder.decoding import opened
from diffusion.data.resizing import Resizing
from diffusion.runtime import files, preemption

RECORDS_PER_READ = 1000
BYTES_PER_READ = 2**25  # of decoded pictures: 32 MiB
# What the system says of a read that failed and may succeed later.
OF_THE_DISK = tuple(map(os.strerror, (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN)))
PROCESSES_FROM_BYTES = 2**26  # of decoded pictures: smaller jobs end before another process has started


def image_shape(name: str, builder: tfds.core.DatasetBuilder, resizing: Resizing) -> tuple[int, int, int]:
    """(H, W, C) of every picture; of the first one if the set promises no size.

    Raises:
        ValueError: they do not fit, or do not have 8 bits and 1 or 3 channels.
    """
    height, width, channels = prepared.image_shape(name, builder)
    if height is None or width is None:
        height, width = _first_size(name, builder)
    return resizing.shape(name, (height, width, channels))


def _first_size(name: str, builder: tfds.core.DatasetBuilder) -> tuple[int, int]:
    """(height, width) of the first training picture.

    Raises:
        ValueError: there is none, or the records are damaged.
    """
    stored, numbers = prepared.records(name, builder, "train")
    if not len(numbers):
        raise ValueError(f"data.name={name!r} has no training pictures in {builder.data_dir}")
    with _damage_named(name, builder, "train"):
        [(encoded, _)] = next(_examples(builder, stored, numbers[:1]))
        return metadata.tolerated(_size, encoded)


def _size(encoded: bytes) -> tuple[int, int]:
    with opened(io.BytesIO(encoded), formats=None) as picture:
        return picture.height, picture.width


@contextlib.contextmanager
def _damage_named(name: str, builder: tfds.core.DatasetBuilder, split: str) -> Iterator[None]:
    """Raises a ValueError that names the set for an error inside, unless the disk or the memory is at fault.

    ArrayRecord reads in C++. Its error is a RuntimeError with the system's words, also if a read fails.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # ArrayRecord, protobuf and Pillow raise different types for garbage
        if isinstance(error, OSError) and not isinstance(error, UnidentifiedImageError):
            raise
        if isinstance(error, RuntimeError) and any(words in str(error) for words in OF_THE_DISK):
            raise OSError(f"cannot read the {split} pictures of data.name={name!r} ({error})") from error
        raise _damaged(name, builder, split, error) from error


def _damaged(name: str, builder: tfds.core.DatasetBuilder, split: str, error: Exception) -> ValueError:
    return ValueError(
        f"cannot decode the {split} pictures of data.name={name!r} ({error}): "
        f"copy or prepare {builder.data_dir} again"
    )


@dataclasses.dataclass(frozen=True)
class Stored:
    """The split to read of a prepared set. Its length is the number of its pictures.

    Raises:
        ValueError: there is no such split, or its pictures do not fit.
    """

    name: str
    builder: tfds.core.DatasetBuilder
    split: str
    resizing: Resizing

    @functools.cached_property
    def _where(self) -> tuple[str, Int[np.ndarray, " n"]]:
        return prepared.records(self.name, self.builder, self.split)

    @property
    def stored_split(self) -> str:
        """The split of the prepared set to which the records belong."""
        return self._where[0]

    @property
    def numbers(self) -> Int[np.ndarray, " n"]:
        """The numbers of the records in that split."""
        return self._where[1]

    def __len__(self) -> int:
        return len(self.numbers)

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """[N, H, W, C]."""
        return (len(self), *image_shape(self.name, self.builder, self.resizing))

    @property
    def num_bytes(self) -> int:
        """The number of bytes of all pixel values."""
        return math.prod(self.shape)

    @property
    def has_labels(self) -> bool:
        return prepared.num_classes(self.builder) > 0

    @property
    def directory(self) -> Path:
        """The directory of the prepared set."""
        return Path(self.builder.data_dir)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of the record files. It changes when the set is prepared or copied again."""
        return records.fingerprint(self.builder, self.stored_split)

    def file_name(self, what: str, ending: str, fingerprint: str = "") -> str:
        """The name of a file made from these records, by default from their present state."""
        return f"{what}-{self.split}{self.resizing}-{fingerprint or self.fingerprint}.{ending}"

    def decoded(self, begin: int) -> Iterator[tuple[UInt8[np.ndarray, "b h w c"], Int32[np.ndarray, " b"]]]:
        """The pictures from number `begin` on and their classes, some at a time. All cores decode if there are many.

        Raises:
            ValueError: the records are damaged, or the pictures differ in size or have more pixel values than declared.
        """
        parts, num_bytes = self._read(begin), (len(self) - begin) * math.prod(self.shape[1:])
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
                raise _damaged(self.name, self.builder, self.split, error) from error

    def _read(self, begin: int) -> Iterator[decoders.Part]:
        with _damage_named(self.name, self.builder, self.split):
            image_bytes = math.prod(self.shape[1:])
            yield from _examples(self.builder, self.stored_split, self.numbers[begin:], image_bytes)

    def reader(self) -> Callable[[int], UInt8[np.ndarray, "h w c"]]:
        """A thread-safe function from a record's number to its picture. Its errors are those of `decoded`."""
        source, parser = _data_source(self.builder, self.stored_split), _parser(self.builder, ["image"])

        def picture(number: int) -> UInt8[np.ndarray, "h w c"]:
            with _damage_named(self.name, self.builder, self.split):
                encoded = _parse(parser, source[number])["image"]
                pixels = decoders.decode(self.resizing, self.shape[-1], [encoded])
            return self._pixels(pixels)[0]

        return picture

    def _pixels(self, pictures: decoders.Pictures) -> UInt8[np.ndarray, "b h w c"]:
        """The pictures as one array. Raises a ValueError if one has another size, or a pixel value out of range."""
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


def _examples(
    builder: tfds.core.DatasetBuilder, split: str, numbers: Int[np.ndarray, " n"], image_bytes: int = 1
) -> Iterator[decoders.Part]:
    """These records of a stored split as encoded pictures and classes, RECORDS_PER_READ at a time."""
    # Parsing only the image and the label halves the time of reading.
    parser = _parser(builder, ["image", "label"] if prepared.num_classes(builder) else ["image"])
    source = _data_source(builder, split)
    length = max(min(RECORDS_PER_READ, BYTES_PER_READ // image_bytes), 1)
    for begin in range(0, len(numbers), length):
        chunk = source.__getitems__(numbers[begin : begin + length].tolist())
        parsed = [_parse(parser, record) for record in chunk]
        yield [(example["image"], int(example.get("label", 0))) for example in parsed]


def _data_source(builder: tfds.core.DatasetBuilder, split: str):
    """The records by number; all files of the split stay open."""
    files.allow_open(len(builder.info.splits[split].filepaths))
    return builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)


def _parser(builder: tfds.core.DatasetBuilder, wanted: list[str]) -> tfds.features.FeaturesDict:
    return tfds.features.FeaturesDict({feature: builder.info.features[feature] for feature in wanted})


def _parse(parser: tfds.features.FeaturesDict, record: bytes) -> dict:
    """The features of a record, with the picture encoded. TFDS would decode it with OpenCV, if that is installed, whose
    JPEG pixels may differ from Pillow's. Raises a ValueError if there is no picture."""
    example = parser.deserialize_example_np(record, decoders={"image": tfds.decode.SkipDecoding()})
    if example["image"] is None:  # ArrayRecord reads a record that is cut off as an empty one
        raise ValueError("a record has no picture")
    return example
