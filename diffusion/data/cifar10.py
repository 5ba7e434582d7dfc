"""TFDS builder of CIFAR-10 (Krizhevsky, 2009) from the official binary archive, without TensorFlow."""

import hashlib
import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from diffusion.runtime import preemption
from diffusion.runtime.download import download

# The author's server took an hour in July 2026 (pytorch/vision issue 9536). If it fails or is slow, a copy is read
# that was made for Swift for TensorFlow. We could not test this copy, but its digest is checked.
URLS = (
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/cifar-10-binary.tar.gz",
)
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"

LABELS = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
RECORD_BYTES = 1 + 3 * 32 * 32  # the label, then the red, the green and the blue plane


class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """CIFAR-10 with the directory, features and keys of TFDS's own builder, which needs TensorFlow."""

    VERSION = tfds.core.Version("3.0.2")
    NUM_TRAIN = 50_000
    NUM_TEST = 10_000

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="60,000 colour photographs of 32x32 pixels in 10 classes.",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(32, 32, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=LABELS),
                }
            ),
            homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
            metadata=tfds.core.MetadataDict(num_levels=256),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        archive = find_archive(Path(self.data_dir_root), URLS, SHA256)
        return {
            "train": self._generate_examples(archive, "train", [f"data_batch_{i}.bin" for i in range(1, 6)]),
            "test": self._generate_examples(archive, "test", ["test_batch.bin"]),
        }

    def _generate_examples(self, archive: Path, split: str, members: list[str]) -> Iterator[tuple[int, dict]]:
        with tarfile.open(archive) as tar:
            records = b"".join(tar.extractfile(f"cifar-10-batches-bin/{member}").read() for member in members)
        records = np.frombuffer(records, np.uint8).reshape(-1, RECORD_BYTES)
        for index, record in enumerate(tqdm(records, desc=f"preparing cifar10 {split}")):
            preemption.point()
            png = io.BytesIO()
            Image.fromarray(record[1:].reshape(3, 32, 32).transpose(1, 2, 0)).save(png, "png")
            yield index, {"id": f"{split}_{index:05d}", "image": png.getvalue(), "label": int(record[0])}


BUILDER = Cifar10  # of data.name=cifar10


def find_archive(data_dir: Path, urls: Sequence[str], sha256: str) -> Path:
    """The file of `urls`: a copy in `data_dir` or `data_dir`/downloads, or else a download to the latter.

    Raises:
      ValueError: the SHA-256 of a copy is not `sha256`.
      ConnectionError: the download failed.
    """
    filename = urls[0].rpartition("/")[2]
    by_hand, downloaded = data_dir / filename, data_dir / "downloads" / filename
    for path in (by_hand, downloaded):
        if path.exists():
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256:
                raise ValueError(f"{path} has SHA-256 {found}, not {sha256}: delete it to download it again")
            return path
    try:
        download(urls, sha256, downloaded)
    except OSError as error:
        raise ConnectionError(
            f"could not download {urls[0]} ({error}): put a copy at {by_hand}, "
            "or set data.data_dir to a TFDS directory that holds cifar10 in ArrayRecord format"
        ) from error
    return downloaded
