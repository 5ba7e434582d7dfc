"""Whole splits as uint8 arrays, and what a data set holds."""

import dataclasses

import numpy as np
from jaxtyping import UInt8

MAX_BYTES = 4 * 2**30  # splits live in memory: ImageNet 32x32 fits, LSUN does not


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """One split, decoded. `images` are grey levels 0..num_levels - 1."""

    name: str
    split: str
    images: UInt8[np.ndarray, "n h w c"]
    num_levels: int

    @property
    def split_number(self) -> int:
        """Tells the splits' random numbers apart."""
        return ("train", "test").index(self.split)


@dataclasses.dataclass(frozen=True)
class Description:
    """What a data set holds. `image_shape` is (height, width, channels)."""

    name: str
    num_train: int
    num_test: int
    image_shape: tuple[int, int, int]
    num_levels: int


def load(name: str, split: str, data_dir: str | None = None) -> ImageSet:
    """Every picture of one split, in the order of its record files.

    "digits" and "cifar10" are prepared on first use (cifar10 is downloaded); any other set must lie in
    `data_dir` as TFDS prepared it, in ArrayRecord format. Decoded pictures are kept beside the prepared data.

    Args:
      name: "name", "name/config" or "name:version", as TFDS writes them; without a version, the newest one.
      split: "train" or "test".
      data_dir: root of the TFDS directories; None or "" for TFDS's default.

    Raises:
      FileNotFoundError: the set or one of its files is missing.
      ValueError: a malformed name, no such split, another file format than ArrayRecord, no `image` feature of
        fixed shape with 1 or 3 channels, more pictures than fit in memory, or a wrong checksum.
      OSError: the download failed (ConnectionError), or `data_dir` cannot be written.
    """
    # TFDS takes a second to import, which `main.py --help` should not cost.
    from diffusion.data import decode, prepared

    root = prepared.resolve_data_dir(data_dir)
    directory = prepared.find(name, root) or prepared.prepare(name, root)
    builder = prepared.open_directory(name, directory)
    shape = (prepared.num_examples(name, builder, split), *prepared.image_shape(name, builder))
    if np.prod(shape) > MAX_BYTES:
        raise ValueError(
            f"data.name={name!r} has a {split} split of shape {shape}, "
            f"more than the {MAX_BYTES / 2**30:g} GiB that are held in memory: take a smaller set"
        )
    images = decode.cached(name, builder, split)
    num_levels = prepared.num_levels(builder)
    if images.max(initial=0) >= num_levels:
        raise ValueError(f"data.name={name!r} has grey level {images.max()}, but only {num_levels} levels")
    return ImageSet(name, split, images, num_levels)


def describe(name: str, data_dir: str | None = None) -> Description:
    """What `name` holds, without reading, preparing or downloading pictures. Raises what `load` raises."""
    from diffusion.data import prepared

    root = prepared.resolve_data_dir(data_dir)
    directory = prepared.find(name, root)
    if directory is None:
        builder = prepared.own_builder(name, root)
        if builder is None:
            raise prepared.missing(name, root)
        num_train, num_test = builder.NUM_TRAIN, builder.NUM_TEST
    else:
        builder = prepared.open_directory(name, directory)
        num_train, num_test = (prepared.num_examples(name, builder, split) for split in ("train", "test"))
    shape = prepared.image_shape(name, builder)
    return Description(name, num_train, num_test, shape, prepared.num_levels(builder))
