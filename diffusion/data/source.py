"""What a data set is: pixel values and labels by index, and what is known of a set before it is read."""

import dataclasses

import numpy as np
from jaxtyping import Int, Int32, UInt8

MAX_BYTES = 4 * 2**30  # splits live in memory: ImageNet 32x32 fits, LSUN does not
SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a data set. `len(source)` is the number of its examples.

    Attributes:
        name: of the data set.
        split: "train" or "test".
        pixels: uint8 [N, H, W, C], pixel values 0…num_levels − 1.
        classes: int32 [N], 0…num_classes − 1; None for a set without labels.
        num_levels: how many values a channel of a pixel can have.
        num_classes: 0 for a set without labels.
    """

    name: str
    split: str
    pixels: UInt8[np.ndarray, "n h w c"]
    num_levels: int = 256
    classes: Int32[np.ndarray, " n"] | None = None
    num_classes: int = 0

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""
        return self.pixels.shape[1:]

    @property
    def split_number(self) -> int:
        """Tells the random numbers of the splits apart."""
        return SPLITS.index(self.split)

    def images(self, indices: Int[np.ndarray, " b"] | slice = slice(None)) -> UInt8[np.ndarray, "b h w c"]:
        """The pixel values of these examples; of all examples without a copy."""
        return self.pixels[indices]

    def labels(self, indices: Int[np.ndarray, " b"] | slice = slice(None)) -> Int32[np.ndarray, " b"]:
        """The classes of these examples.

        Raises:
            ValueError: the set has no labels.
        """
        if self.classes is None:
            raise ValueError(f"data.name={self.name!r} has no labels")
        return self.classes[indices]


@dataclasses.dataclass(frozen=True)
class Description:
    """What a data set holds. `image_shape` is (height, width, channels)."""

    name: str
    num_train: int
    num_test: int
    image_shape: tuple[int, int, int]
    num_levels: int
    num_classes: int


def load(name: str, split: str, data_dir: str | None = None) -> Source:
    """One split of a data set, in the order of its record files.

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
    from diffusion.data import tfds

    root = tfds.resolve_data_dir(data_dir)
    directory = tfds.find(name, root) or tfds.prepare(name, root)
    builder = tfds.open_directory(name, directory)
    shape = (tfds.num_examples(name, builder, split), *tfds.image_shape(name, builder))
    if np.prod(shape) > MAX_BYTES:
        raise ValueError(
            f"data.name={name!r} has a {split} split of shape {shape}, "
            f"more than the {MAX_BYTES / 2**30:g} GiB that are held in memory: take a smaller set"
        )
    pixels, classes = tfds.decoded(name, builder, split)
    num_levels = tfds.num_levels(builder)
    if pixels.max(initial=0) >= num_levels:
        raise ValueError(f"data.name={name!r} has pixel value {pixels.max()}, but only {num_levels} levels")
    return Source(name, split, pixels, num_levels, classes, tfds.num_classes(builder))


def describe(name: str, data_dir: str | None = None) -> Description:
    """What `name` holds, without reading, preparing or downloading pictures. Raises what `load` raises."""
    from diffusion.data import tfds

    root = tfds.resolve_data_dir(data_dir)
    directory = tfds.find(name, root)
    if directory is None:
        builder = tfds.own_builder(name, root)
        if builder is None:
            raise tfds.missing(name, root)
        num_train, num_test = builder.NUM_TRAIN, builder.NUM_TEST
    else:
        builder = tfds.open_directory(name, directory)
        num_train, num_test = (tfds.num_examples(name, builder, split) for split in SPLITS)
    shape, num_levels = tfds.image_shape(name, builder), tfds.num_levels(builder)
    return Description(name, num_train, num_test, shape, num_levels, tfds.num_classes(builder))
