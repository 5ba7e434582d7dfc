"""The record files from which pictures were decoded: compared by name, size and time, or by content if only times
differ.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import tensorflow_datasets as tfds
from tqdm import tqdm

from diffusion.runtime import files, preemption

FINGERPRINT_LETTERS = 16


def about(pixels_path: Path) -> Path:
    """The file that names the records from which the pictures in `pixels_path` were decoded."""
    return pixels_path.with_name(f"{pixels_path.name}.records")


def known_fingerprints(pattern: Path) -> list[str]:
    """The fingerprints in place of * in `pattern`, such as decoded-train-*.npy, that have such a file."""
    wanted = about(pattern).name.replace("*", FINGERPRINT_LETTERS * "[0-9a-f]")
    return sorted(path.name.split(".")[-3].split("-")[-1] for path in pattern.parent.glob(wanted))


def write_about(pixels_path: Path, name: str, builder: tfds.core.DatasetBuilder, split: str) -> None:
    """Writes this file beside the pictures if the disk has room."""
    with contextlib.suppress(OSError):
        found = {"sizes": sizes(builder, split), "sha256": content_sha256(name, builder, split)}
        files.write_text(about(pixels_path), json.dumps(found) + "\n")


def read_about(pixels_path: Path) -> dict:
    """The contents of this file; {} if it is absent or damaged."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(about(pixels_path).read_text())
        return found if isinstance(found, dict) else {}
    return {}


def sizes(builder: tfds.core.DatasetBuilder, split: str) -> dict[str, int]:
    """The record files of a stored split."""
    return {path.name: os.stat(path).st_size for path in builder.info.splits[split].filepaths}


def content_sha256(name: str, builder: tfds.core.DatasetBuilder, split: str) -> str:
    """A digest of the metadata and of all bytes of the record files."""
    digest = _metadata_digest(builder)
    for path in tqdm(builder.info.splits[split].filepaths, desc=f"reading {name} {split}", unit=" files", leave=False):
        preemption.point()
        with open(path, "rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _metadata_digest(builder: tfds.core.DatasetBuilder) -> "hashlib._Hash":
    digest = hashlib.sha256()
    for path in sorted(Path(builder.data_dir).glob("*.json")):
        digest.update(path.read_bytes())
    return digest


def fingerprint(builder: tfds.core.DatasetBuilder, split: str) -> str:
    """A digest of the metadata and the record files' sizes and times. It changes when the set is prepared or copied."""
    digest = _metadata_digest(builder)
    for path in builder.info.splits[split].filepaths:
        stat = os.stat(path)
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:FINGERPRINT_LETTERS]
