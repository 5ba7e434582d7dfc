"""Can images that stay on disk keep up? Images per second, and how much of the reading time is hidden by steps.

    python -m benchmarks.streaming                       # a set of 15.7 GB: 1,281,149 images of 64×64
    python -m benchmarks.streaming --images=20000 --size=32
    python -m benchmarks.streaming --cold                # as if the file were read for the first time
    python -m benchmarks.streaming --jpeg --images=2000 --size=256 --pause=0.2

The images are random bytes in a file that is mapped into memory, as decoded pictures are. It is written to --scratch
once, and stays there until you delete it. A step is only a pause, as for a host that waits for its device. Three arms
take steps: the pause alone, batches read before each pause, and batches read during earlier pauses, as in training. The
time that the third arm saves over the second is hidden. With --cold the system drops its cache of the file before every
batch; the time includes this.

With --jpeg the images are smooth random pictures as JPEG in record files, decoded on the fly.
"""

import io
import itertools
import math
import os
import resource
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from benchmarks import timing
from benchmarks.timing import Arm, Arms
from diffusion import data
from diffusion.data import Source
from diffusion.runtime import prefetch
from diffusion.training import parallel
from diffusion.training.parallel import Batch
from experiments.commands import exit_with

CHUNK = 10_000  # images per write


def main() -> None:
    parser = timing.arguments(__doc__, "streaming")
    parser.add_argument("--images", type=timing.count, default=1_281_149)
    parser.add_argument("--size", type=timing.count, default=64)
    parser.add_argument("--batch-size", type=timing.count, default=128)
    parser.add_argument("--steps", type=timing.count, default=100, help="steps per arm")
    parser.add_argument("--pause", type=float, default=0.02, help="seconds per step")
    parser.add_argument("--scratch", type=Path, default=Path("runs/benchmarks"), help="where the file goes")
    parser.add_argument("--cold", action="store_true", help="read every batch from the disk itself")
    parser.add_argument("--jpeg", action="store_true", help="JPEG pictures, decoded on the fly")
    args = parser.parse_args()
    source, paths = (jpeg_source if args.jpeg else random_source)(args.scratch, args.images, args.size)
    at_first = peak_gibibytes()
    forgotten = paths if args.cold else []
    costs = timing.in_this_process(arms(source, args.batch_size, args.steps, args.pause, forgotten), args.rounds)

    def columns(_: str, seconds: np.ndarray) -> dict[str, Any]:
        rate = timing.quartiles(args.batch_size * args.steps / seconds)
        return {"milliseconds per step": timing.quartiles(1e3 * seconds / args.steps), "images/s": rate}

    rows = timing.rows(costs, columns)
    _, pause, before, during = (cost.seconds for cost in costs.values())
    hidden = timing.quartiles((before - during) / (before - pause))
    size = {
        "set, GiB": math.prod(source.pixels.shape) / 2**30,
        "peak of resident memory, GiB": [at_first, peak_gibibytes()],
    }
    timing.finish(args.out, vars(args) | {"scratch": str(args.scratch)}, rows, hidden=hidden, memory=size)


def peak_gibibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def random_source(scratch: Path, num_images: int, size: int) -> tuple[Source, list[Path]]:
    """Random pictures in a file, and the file. It is made if it does not exist."""
    path, shape = scratch / f"random-{num_images}-{size}.npy", (num_images, size, size, 3)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished, rng = path.with_suffix(".unfinished"), np.random.default_rng(0)
        with unfinished.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for begin in range(0, num_images, CHUNK):
                file.write(rng.bytes(min(CHUNK, num_images - begin) * size * size * 3))
        unfinished.rename(path)
    return Source("random", "train", np.load(path, mmap_mode="r")), [path]


def jpeg_source(scratch: Path, num_images: int, size: int) -> tuple[Source, list[Path]]:
    """Smooth random pictures in record files, and the files. They are made if they do not exist."""

    class Jpeg(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name = f"jpeg_{num_images}_{size}"

        def _info(self) -> tfds.core.DatasetInfo:
            image = tfds.features.Image(shape=(size, size, 3), encoding_format="jpeg")
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"image": image}))

        def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict]]:
            rng, coarse = np.random.default_rng(0), (-(-size // 8), -(-size // 8), 3)
            for number in range(num_images):
                smooth = Image.fromarray(rng.integers(0, 256, coarse, np.uint8)).resize((size, size), Image.BICUBIC)
                pixels = np.asarray(smooth) + rng.normal(0, 6, (size, size, 3))
                jpeg = io.BytesIO()
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(jpeg, "jpeg", quality=90)
                yield number, {"image": jpeg.getvalue()}

    builder = Jpeg(data_dir=scratch, file_format="array_record")
    builder.download_and_prepare()
    source = data.load(builder.name, "train", str(scratch), decode="on_the_fly")
    return source, list(Path(builder.data_dir).glob("*.array_record*"))


def forget(path: Path) -> None:
    """Drops the file from the system's cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())  # what is not yet on the disk stays in memory
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def arms(source: Source, batch_size: int, num_steps: int, pause: float, forgotten: list[Path]) -> Arms:
    """The batches alone, the pauses alone, and both: one after the other, or at the same time."""
    place, counter = parallel.streamed(source), itertools.count()

    def batches() -> Iterator[Batch]:
        for step in itertools.islice(counter, num_steps):
            for path in forgotten:
                forget(path)
            yield jax.block_until_ready(place(data.batch_indices(0, step, batch_size, len(source))[None]))

    def take(steps: Iterator, seconds: float) -> None:
        for _ in steps:
            if seconds:
                time.sleep(seconds)

    def take_during() -> None:
        with closing(prefetch.prefetched(batches())) as ahead:
            take(ahead, pause)

    return {
        "read alone": Arm(lambda: take(batches(), 0)),
        "pause alone": Arm(lambda: take(range(num_steps), pause)),
        "read before each pause": Arm(lambda: take(batches(), pause)),
        "read during the pauses": Arm(take_during),
    }


if __name__ == "__main__":
    exit_with(main)
