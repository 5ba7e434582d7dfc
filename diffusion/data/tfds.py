"""Prepared TFDS directories: finding, checking and decoding them, and preparing the project's own."""

import contextlib
import functools
import hashlib
import importlib
import io
import os
import pkgutil
import re
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int32, UInt8
from PIL import Image
from tqdm import tqdm

from diffusion.runtime import files

RECORDS_PER_READ = 1000
Decoded = tuple[UInt8[np.ndarray, "n h w c"], Int32[np.ndarray, " n"] | None]


@functools.cache
def own_builders() -> dict[str, type[tfds.core.GeneratorBasedBuilder]]:
    """The project's own builders by name: the BUILDER of every file of this folder that has one."""
    files_here = pkgutil.iter_modules([Path(__file__).parent])
    modules = {info.name: importlib.import_module(f"diffusion.data.{info.name}") for info in files_here}
    return {name: module.BUILDER for name, module in modules.items() if hasattr(module, "BUILDER")}


def resolve_data_dir(data_dir: str | None) -> Path:
    """`data_dir`, or where TFDS itself keeps data when that is None or empty.

    Raises:
      ValueError: it is a URL.
    """
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" in chosen:
        raise ValueError(f"data.data_dir={chosen} is not a local directory; mount the bucket and take its path there")
    return Path(chosen).expanduser()


def own_builder(name: str, data_dir: Path) -> tfds.core.GeneratorBasedBuilder | None:
    """The project's own builder of `name` ("digits", "cifar10:3.0.2"), or None if it has none."""
    base, _, version = name.partition(":")
    builder_class = own_builders().get(base)
    if builder_class is None or version not in ("", str(builder_class.VERSION)):
        return None
    return builder_class(data_dir=data_dir, file_format="array_record")


def find(name: str, data_dir: Path) -> Path | None:
    """The directory of the prepared set "name[/config][:version]", by default of its newest version, if any.

    Raises:
      ValueError: a malformed name.
    """
    match = re.fullmatch(r"(\w+(?:/\w[\w.+-]*)?)(?::(\d+\.\d+\.\d+))?", name)
    if match is None:
        raise ValueError(f'data.name={name!r} must look like "name", "name/config" or "name:1.0.0"')
    base, wanted = match.groups()
    versions = [path.parent.name for path in (data_dir / base).glob("*/dataset_info.json")]
    versions = [version for version in versions if re.fullmatch(r"\d+\.\d+\.\d+", version)]
    if wanted:
        versions = [version for version in versions if version == wanted]
    return data_dir / base / max(versions, key=tfds.core.Version) if versions else None


def missing(name: str, data_dir: Path) -> FileNotFoundError:
    """What to say when `name` is neither prepared in `data_dir` nor one of the project's own."""
    infos = [*data_dir.glob("*/*/dataset_info.json"), *data_dir.glob("*/*/*/dataset_info.json")]
    present = sorted({str(info.parent.parent.relative_to(data_dir)) for info in infos})
    return FileNotFoundError(
        f"data.name={name!r} is not prepared in data.data_dir={str(data_dir)!r} "
        f"(found there: {', '.join(present) or 'nothing'}): set data.data_dir to where it is, "
        f"take one of {', '.join(own_builders())}, which are prepared on first use, or run `tfds build {name} "
        f"--file_format=array_record --data_dir={data_dir}` where TensorFlow is installed"
    )


def prepare(name: str, data_dir: Path) -> Path:
    """Prepares one of the project's own sets as ArrayRecord and returns its directory.

    TFDS writes to a temporary directory and renames it when complete, so an interrupted run leaves nothing
    that looks prepared; of two processes at once, the slower fails to rename and takes the other's result.

    Raises:
      FileNotFoundError: the project has no builder of that name.
      ValueError: a wrong checksum.
      OSError: the download failed (ConnectionError), or `data_dir` cannot be written.
    """
    builder = own_builder(name, data_dir)
    if builder is None:
        raise missing(name, data_dir)
    tfds.disable_progress_bar()  # the builders show their own
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download of unknown size
            builder.download_and_prepare()
    except ConnectionError:
        raise
    except OSError as error:
        if find(name, data_dir) is None:
            raise OSError(
                f"cannot prepare {name} in data.data_dir={str(data_dir)!r} ({error}): "
                "set data.data_dir to a directory that can be written"
            ) from error
    return find(name, data_dir)


def open_directory(name: str, directory: Path) -> tfds.core.DatasetBuilder:
    """A builder that reads the prepared `directory`.

    Raises:
      ValueError: it is not in ArrayRecord format.
      FileNotFoundError: some of its files are missing.
    """
    if not (directory / "features.json").exists():
        raise FileNotFoundError(f"{directory}/features.json is missing: copy all that TFDS prepared there")
    builder = tfds.builder_from_directory(directory)
    formats = sorted(file_format.value for file_format in builder.info.available_file_formats())
    if "array_record" not in formats:
        raise ValueError(
            f"data.name={name!r} in {directory} is stored as {', '.join(formats)}, not as ArrayRecord: "
            "set data.data_dir to another directory, or where TensorFlow is installed run "
            f"`tfds convert_format --dataset_version_dir={directory} --out_file_format=array_record`"
        )
    # A directory converted in place has both formats and names the older one first.
    builder.info.set_file_format("array_record", override=True, override_if_initialized=True)
    for split_info in builder.info.splits.values():
        for path in split_info.filepaths:
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing: copy all that TFDS prepared there")
    return builder


def image_shape(name: str, builder: tfds.core.DatasetBuilder) -> tuple[int, int, int]:
    """(height, width, channels) of every picture.

    Raises:
      ValueError: the set has no `image` feature of 8 bits, fixed shape and 1 or 3 channels.
    """
    features = builder.info.features
    names = list(features) if isinstance(features, tfds.features.FeaturesDict) else []
    image = features["image"] if "image" in names else None
    if not isinstance(image, tfds.features.Image) or image.np_dtype != np.uint8:
        raise ValueError(f"data.name={name!r} has no 8-bit picture feature `image`, only {names}")
    if None in image.shape or image.shape[-1] not in (1, 3):
        raise ValueError(
            f"data.name={name!r} has pictures of shape {image.shape}, but all must have one height and width "
            "and 1 or 3 channels: take a set or a config whose pictures are resized"
        )
    return image.shape


def num_levels(builder: tfds.core.DatasetBuilder) -> int:
    """Pixel values per channel: what the project's own builders wrote into the metadata, else 256."""
    return int((builder.info.metadata or {}).get("num_levels", 256))


def num_examples(name: str, builder: tfds.core.DatasetBuilder, split: str) -> int:
    """How many examples a prepared split has.

    Raises:
      ValueError: there is no such split.
    """
    splits = builder.info.splits
    if split not in splits:
        raise ValueError(f"data.name={name!r} has no split {split!r}, only {', '.join(map(repr, splits))}")
    return splits[split].num_examples


def num_classes(builder: tfds.core.DatasetBuilder) -> int:
    """How many classes the `label` feature has; 0 where there is none."""
    features = builder.info.features
    label = features["label"] if "label" in list(features) else None
    return label.num_classes if isinstance(label, tfds.features.ClassLabel) else 0


def decoded(name: str, builder: tfds.core.DatasetBuilder, split: str) -> Decoded:
    """The pixel values and the classes of a split, from files if there are some that fit the prepared data.

    Raises:
      ValueError: the record files are damaged.
    """
    of_split = f"{split}-{_fingerprint(builder, split)}.npy"
    pixels_path, classes_path = (Path(builder.data_dir) / f"{what}-{of_split}" for what in ("decoded", "classes"))
    num_images, has_labels = builder.info.splits[split].num_examples, num_classes(builder) > 0
    try:
        pixels = np.load(pixels_path)
        classes = np.load(classes_path) if has_labels else None
        fits = pixels.shape == (num_images, *builder.info.features["image"].shape)
        if fits and (classes is None or len(classes) == num_images):
            return pixels, classes
    except (OSError, ValueError, EOFError):
        pass  # absent, unreadable or incomplete: decode again
    try:
        pixels, classes = _decode(name, builder, split)
    except Exception as error:  # ArrayRecord, protobuf and Pillow raise different types for garbage
        raise ValueError(
            f"cannot decode the {split} pictures of data.name={name!r} ({error}): "
            f"copy or prepare {builder.data_dir} again"
        ) from error
    # On a read-only or full disk the next run only has to decode again.
    with contextlib.suppress(OSError):
        for path, array in ((classes_path, classes), (pixels_path, pixels)):
            if array is not None:
                with files.replacing(path) as file:
                    np.save(file, array)
    return pixels, classes


def _decode(name: str, builder: tfds.core.DatasetBuilder, split: str) -> Decoded:
    """Decodes every picture of a split (CIFAR-10's 50,000 take about ten seconds on one core)."""
    # Parsing the image and the label without their companions halves the time of reading. TFDS would decode with
    # OpenCV where that is installed, whose JPEG pixels need not be Pillow's.
    image, has_labels = builder.info.features["image"], num_classes(builder) > 0
    records = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    wanted = {"image": image} | ({"label": builder.info.features["label"]} if has_labels else {})
    parser = tfds.features.FeaturesDict(wanted)
    mode = "L" if image.shape[-1] == 1 else "RGB"
    pixels = np.empty((len(records), *image.shape), np.uint8)
    classes = np.empty(len(records), np.int32) if has_labels else None
    with tqdm(total=len(records), desc=f"decoding {name} {split}", unit=" images", leave=False) as progress:
        for begin in range(0, len(records), RECORDS_PER_READ):
            chunk = range(begin, min(begin + RECORDS_PER_READ, len(records)))
            for index, record in zip(chunk, records.__getitems__(chunk), strict=True):
                example = parser.deserialize_example_np(record, decoders={"image": tfds.decode.SkipDecoding()})
                with Image.open(io.BytesIO(example["image"])) as picture:
                    pixels[index] = np.asarray(picture.convert(mode)).reshape(image.shape)
                if has_labels:
                    classes[index] = example["label"]
            progress.update(len(chunk))
    return pixels, classes


def _fingerprint(builder: tfds.core.DatasetBuilder, split: str) -> str:
    """A digest of the metadata and the record files' sizes and times: it changes when the set is prepared again."""
    digest = hashlib.sha256()
    for path in sorted(Path(builder.data_dir).glob("*.json")):
        digest.update(path.read_bytes())
    for path in builder.info.splits[split].filepaths:
        stat = os.stat(path)
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
