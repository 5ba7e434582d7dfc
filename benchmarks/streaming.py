"""Whether images that stay on disk keep up: images a second, and how much of their time a step hides.

    python -m benchmarks.streaming                       # a set of 15.7 GB: 1,281,149 images of 64×64
    python -m benchmarks.streaming --images=20000 --size=32
    python -m benchmarks.streaming --cold                # as if the file were read for the first time

The images are random bytes in a file that is mapped into memory, as decoded pictures are. It is written to --scratch
once, and stays there until you delete it. Three arms take steps whose work is a pause, as it is for a host whose
device is at work: the pause alone, batches that are read before each pause, and batches that are read during the pauses
before, as training does it. What the second arm loses and the third one does not is hidden. With --cold the system
forgets what it keeps of the file before every batch; dropping it is a part of the time.
"""

import itertools
import os
import resource
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import timing
from benchmarks.timing import Arm, Arms
from diffusion import data
from diffusion.data import Source
from diffusion.runtime import prefetch
from diffusion.training import parallel
from diffusion.training.parallel import Batch

STEPS = 100  # of an arm
CHUNK = 10_000  # images that are written at a time


def main() -> None:
    parser = timing.arguments(__doc__, "streaming")
    parser.add_argument("--images", type=int, default=1_281_149)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--pause", type=float, default=0.02, help="seconds of a step")
    parser.add_argument("--scratch", type=Path, default=Path("runs/benchmarks"), help="where the file goes")
    parser.add_argument("--cold", action="store_true", help="read every batch from the disk itself")
    args = parser.parse_args()
    path = args.scratch / f"random-{args.images}-{args.size}.npy"
    source = random_source(path, args.images, args.size)
    at_first = peak_gibibytes()
    forgotten = path if args.cold else None
    costs = timing.in_this_process(arms(source, args.batch_size, args.pause, forgotten), args.rounds)

    def columns(_: str, seconds: np.ndarray) -> dict[str, Any]:
        rate = timing.quartiles(args.batch_size * STEPS / seconds)
        return {"milliseconds per step": timing.quartiles(1e3 * seconds / STEPS), "images/s": rate}

    rows = timing.rows(costs, columns)
    _, pause, before, during = (cost.seconds for cost in costs.values())
    hidden = timing.quartiles((before - during) / (before - pause))
    size = {"set, GiB": source.images().nbytes / 2**30, "peak of resident memory, GiB": [at_first, peak_gibibytes()]}
    timing.finish(args.out, vars(args) | {"scratch": str(args.scratch)}, rows, hidden=hidden, memory=size)


def peak_gibibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def random_source(path: Path, num_images: int, size: int) -> Source:
    """Random pictures in a file, which is made if it is not there."""
    shape = (num_images, size, size, 3)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished, rng = path.with_suffix(".unfinished"), np.random.default_rng(0)
        with unfinished.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for begin in range(0, num_images, CHUNK):
                file.write(rng.bytes(min(CHUNK, num_images - begin) * size * size * 3))
        unfinished.rename(path)
    return Source("random", "train", np.load(path, mmap_mode="r"))


def forget(path: Path) -> None:
    """The system no longer keeps any of the file in its memory."""
    with path.open("rb") as file:
        os.fsync(file.fileno())  # what is not yet on the disk stays in memory
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def arms(source: Source, batch_size: int, pause: float, forgotten: Path | None) -> Arms:
    """The batches alone, the pauses alone, and both: one after the other, or at the same time."""
    place, counter = parallel.streamed(source), itertools.count()

    def batches() -> Iterator[Batch]:
        for step in itertools.islice(counter, STEPS):
            if forgotten:
                forget(forgotten)
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
        "pause alone": Arm(lambda: take(range(STEPS), pause)),
        "read before each pause": Arm(lambda: take(batches(), pause)),
        "read during the pauses": Arm(take_during),
    }


if __name__ == "__main__":
    main()
