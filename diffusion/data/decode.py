"""Decoding a prepared split to uint8 once, and keeping the result beside the prepared data."""

import contextlib
import hashlib
import io
import os
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from diffusion import files

RECORDS_PER_READ = 1000


def cached(name: str, builder: tfds.core.DatasetBuilder, split: str) -> UInt8[np.ndarray, "n h w c"]:
    """The pictures of a split, from its .npy file if there is one that fits the prepared data.

    Raises:
      ValueError: the record files are damaged.
    """
    info = builder.info
    path = Path(builder.data_dir) / f"decoded-{split}-{_fingerprint(builder, split)}.npy"
    try:
        images = np.load(path)
        if images.shape == (info.splits[split].num_examples, *info.features["image"].shape):
            return images
    except (OSError, ValueError, EOFError):
        pass  # absent, unreadable or cut short: decode anew
    try:
        images = _decode(name, builder, split)
    except Exception as error:  # ArrayRecord, protobuf and Pillow each have their own words for garbage
        raise ValueError(
            f"cannot decode the {split} pictures of data.name={name!r} ({error}): "
            f"copy or prepare {builder.data_dir} again"
        ) from error
    # A read-only or full disk costs the next run some seconds, nothing else.
    with contextlib.suppress(OSError), files.replacing(path) as file:
        np.save(file, images)
    return images


def _decode(name: str, builder: tfds.core.DatasetBuilder, split: str) -> UInt8[np.ndarray, "n h w c"]:
    """Decodes every picture of a split (CIFAR-10's 50,000 take about ten seconds on one core)."""
    # Parsing the image without its companions halves the time of reading. TFDS would decode with OpenCV where
    # that is installed, whose JPEG pixels need not be Pillow's.
    feature = builder.info.features["image"]
    records = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    parser = tfds.features.FeaturesDict({"image": feature})
    undecoded = {"image": tfds.decode.SkipDecoding()}
    mode = "L" if feature.shape[-1] == 1 else "RGB"
    images = np.empty((len(records), *feature.shape), np.uint8)
    with tqdm(total=len(records), desc=f"decoding {name} {split}", unit=" images", leave=False) as progress:
        for begin in range(0, len(records), RECORDS_PER_READ):
            chunk = range(begin, min(begin + RECORDS_PER_READ, len(records)))
            for index, record in zip(chunk, records.__getitems__(chunk), strict=True):
                encoded = parser.deserialize_example_np(record, decoders=undecoded)["image"]
                with Image.open(io.BytesIO(encoded)) as picture:
                    images[index] = np.asarray(picture.convert(mode)).reshape(feature.shape)
            progress.update(len(chunk))
    return images


def _fingerprint(builder: tfds.core.DatasetBuilder, split: str) -> str:
    """A digest of the metadata and the record files' sizes and times: another one once prepared anew."""
    digest = hashlib.sha256()
    for path in sorted(Path(builder.data_dir).glob("*.json")):
        digest.update(path.read_bytes())
    for path in builder.info.splits[split].filepaths:
        stat = os.stat(path)
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
