"""Prepared TFDS directories: finding and checking them, and preparing the project's own."""

import contextlib
import functools
import importlib.util
import io
import os
import pkgutil
import re
import shutil
import time
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int

from diffusion.runtime import files

DEFAULT_DIR = "~/tensorflow_datasets"  # that of TFDS
HELD_OUT = 20  # one of this many examples is for testing, if a set has training examples only


def own_builders() -> list[str]:
    """The names of the project's own sets. They are the files of this folder that have a BUILDER."""
    return [info.name for info in pkgutil.iter_modules([Path(__file__).parent]) if _builder_class(info.name)]


def is_own(name: str) -> bool:
    """Whether a set of that name is the project's own."""
    return _builder_class(name) is not None


@functools.cache
def _builder_class(name: str) -> type[tfds.core.GeneratorBasedBuilder] | None:
    """The project's own builder of a set. Only the file with its name is imported."""
    if importlib.util.find_spec(f"diffusion.data.{name}") is None:
        return None
    return getattr(importlib.import_module(f"diffusion.data.{name}"), "BUILDER", None)


def resolve_data_dir(data_dir: str | None) -> Path:
    """`data_dir`, or TFDS's own directory if that is None or empty.

    Raises:
      ValueError: it is a URL, or it is in a home directory that does not exist.
    """
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or DEFAULT_DIR
    if "://" in chosen:
        raise ValueError(f"data.data_dir={chosen} is not a local directory; remote paths are not read")
    try:
        return files.expanded(chosen)
    except ValueError as error:
        means = f"data.data_dir={data_dir or ''!r} means {chosen}"
        raise ValueError(f"{means}, but {files.NO_HOME}; set data.data_dir") from error


def own_builder(name: str, data_dir: Path) -> tfds.core.GeneratorBasedBuilder | None:
    """The project's own builder of `name` ("digits", "cifar10:3.0.2"), or None if it has none."""
    base, _, version = name.partition(":")
    builder_class = _builder_class(base) if base.isidentifier() else None
    if builder_class is None or version not in ("", str(builder_class.VERSION)):
        return None
    return builder_class(data_dir=data_dir, file_format="array_record")


def find(name: str, data_dir: Path) -> Path | None:
    """The directory of the prepared set "name[/config][:version]", by default its newest version; None if there is
    none.

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
    """The error message if `name` is neither prepared in `data_dir` nor one of the project's own sets."""
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

    TFDS writes to a temporary directory and renames it when complete, so an interrupted run leaves nothing that looks
    prepared. If several processes call it, one prepares and the others wait for its result.

    Raises:
      FileNotFoundError: the project has no builder of that name.
      ValueError: the checksum is wrong.
      OSError: the download failed (ConnectionError), or `data_dir` cannot be written.
    """
    builder = own_builder(name, data_dir)
    if builder is None:
        raise missing(name, data_dir)
    tfds.disable_progress_bar()  # the builders show their own
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        base = name.partition(":")[0]
        lock, waiting = data_dir / f"{base}.preparing", f"waiting for another process, which prepares {base}"
        with files.alone(lock, waiting), contextlib.redirect_stdout(io.StringIO()):
            try:  # TFDS announces a download of unknown size
                if find(name, data_dir) is None:
                    _remove_left_over(data_dir / base)
                    builder.download_and_prepare()
            finally:
                lock.unlink(missing_ok=True)
    except ConnectionError:
        raise
    except OSError as error:
        if find(name, data_dir) is None:
            raise OSError(
                f"cannot prepare {name} in data.data_dir={str(data_dir)!r} ({error}): "
                "set data.data_dir to a directory that can be written"
            ) from error
    return find(name, data_dir)


def _remove_left_over(directory: Path) -> None:
    """Deletes the unfinished files of killed TFDS processes. They cannot be continued."""
    for path in directory.glob("incomplete.*"):
        with contextlib.suppress(OSError):
            if time.time() > path.stat().st_mtime + files.LEFT_SECONDS:
                shutil.rmtree(path)


def open_directory(name: str, directory: Path) -> tfds.core.DatasetBuilder:
    """A builder that reads the prepared `directory`.

    Raises:
      ValueError: it is not in ArrayRecord format, or damaged.
      FileNotFoundError: some of its files are missing.
    """
    if not (directory / "features.json").exists():
        raise FileNotFoundError(f"{directory}/features.json is missing: copy all that TFDS prepared there")
    try:
        builder = tfds.builder_from_directory(directory)
        _ = builder.info.metadata  # TFDS reads it on demand
    except OSError as error:  # TFDS names only the file
        reason = getattr(error.__cause__, "strerror", None)
        raise (OSError(f"{error} ({reason})") if reason else error) from error
    except Exception as error:  # JSON and protobuf raise different types for garbage
        raise ValueError(f"a .json file in {directory} is damaged ({error}): copy or prepare the set again") from error
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


def image_shape(name: str, builder: tfds.core.DatasetBuilder) -> tuple[int | None, int | None, int]:
    """(height, width, channels) of every picture; None if the set promises no size.

    Raises:
      ValueError: the set has no `image` feature with 8 bits and 1 or 3 channels.
    """
    features = builder.info.features
    names = list(features) if isinstance(features, tfds.features.FeaturesDict) else []
    image = features["image"] if "image" in names else None
    if not isinstance(image, tfds.features.Image) or image.np_dtype != np.uint8:
        raise ValueError(f"data.name={name!r} has no 8-bit picture feature `image`, only {names}")
    if image.shape[-1] not in (1, 3):
        raise ValueError(f"data.name={name!r} has pictures of shape {image.shape}, but they must have 1 or 3 channels")
    return image.shape


def num_levels(builder: tfds.core.DatasetBuilder) -> int:
    """The number of pixel values per channel: from the metadata of the project's own builders, or else 256."""
    return int((builder.info.metadata or {}).get("num_levels", 256))


def records(name: str, builder: tfds.core.DatasetBuilder, split: str) -> tuple[str, Int[np.ndarray, " n"]]:
    """The place of the examples of "train" or "test": a split of the prepared set, and the numbers of its records.

    If there is no test split, the validation split is used; without either, every HELD_OUT-th training example.

    Raises:
      ValueError: there is no such split.
    """
    splits = builder.info.splits
    if split not in ("train", "test") or "train" not in splits:
        raise ValueError(f"data.name={name!r} has no split {split!r}, only {', '.join(map(repr, splits))}")
    stored = split if split in splits else "validation" if "validation" in splits else "train"
    numbers = np.arange(splits[stored].num_examples)
    if {"test", "validation"} & set(splits):
        return stored, numbers
    is_held_out = numbers % HELD_OUT == HELD_OUT - 1
    return stored, numbers[is_held_out if split == "test" else ~is_held_out]


def num_classes(builder: tfds.core.DatasetBuilder) -> int:
    """The number of classes of the `label` feature; 0 if there is none."""
    features = builder.info.features
    label = features["label"] if "label" in list(features) else None
    return label.num_classes if isinstance(label, tfds.features.ClassLabel) else 0
