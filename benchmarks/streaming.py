"""Whether images that stay on disk keep up: batches a second, and how much of a batch's time a train step hides.

    python -m benchmarks.streaming                       # a set of 15.7 GB: 1,281,149 images of 64×64
    python -m benchmarks.streaming --images=20000 --size=32

The images are random bytes in a file that is mapped into memory, as decoded pictures are. It is written to --scratch
once, and stays there until you delete it. Three arms take train steps of a small U-Net: on images that are on the
device, on batches that are read from disk before each step, and on batches that are read while the steps before run,
as training does it. What the second arm loses and the third one does not is hidden.
"""

import itertools
import resource
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import jax
import numpy as np

from benchmarks import timing
from configs import cifar10
from diffusion import data
from diffusion.data import Source
from diffusion.experiment import build
from diffusion.runtime import prefetch
from diffusion.training import devices
from diffusion.training.devices import Batches

STEPS = 20  # in an arm, each of one call
ON_DEVICE = 4096  # images of the arm that has them there
TRAIN = ("images on the device", "read before each step", "read while steps run")
CHUNK = 10_000  # images that are written at a time


def main() -> None:
    parser = timing.arguments(__doc__, "streaming")
    parser.add_argument("--images", type=int, default=1_281_149)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--channels", type=int, default=16, help="of the U-Net")
    parser.add_argument("--scratch", type=Path, default=Path("runs/benchmarks"), help="where the file goes")
    args = parser.parse_args()
    source = random_source(args.scratch / f"random-{args.images}-{args.size}.npy", args.images, args.size)
    at_first = peak_gibibytes()
    seconds = timing.alternate(arms(args, source), args.rounds)
    images = args.batch_size * STEPS
    rows = [
        {"arm": name, "seconds": timing.quartiles(values / STEPS), "images/s": timing.quartiles(images / values)}
        for name, values in seconds.items()
    ]
    on_device, before_each, ahead = (seconds[name] for name in TRAIN)
    hidden = timing.quartiles((before_each - ahead) / (before_each - on_device))
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


def arms(args, source: Source) -> dict[str, Callable[[], None]]:
    """The batches alone, and the three ways to train on them."""
    config = cifar10.get_config()
    config.train.batch_size, config.unet.channels = args.batch_size, args.channels
    config.unet.num_groups = 8
    experiment = build.experiment(config, source.image_shape, source.num_levels)
    train_steps = devices.train_steps(experiment.training, seed=0)
    held = [devices.replicate(experiment.initial_state())]
    few = Source("random", "train", np.array(source.images(slice(ON_DEVICE))))
    resident, streamed, counter = devices.resident(few), devices.streamed(source), itertools.count()

    def calls(place: Batches, num_examples: int):
        for step in itertools.islice(counter, STEPS):
            yield place(data.batch_indices(0, step, args.batch_size, num_examples)[None])

    def train(batches) -> None:
        for batch in batches:
            held[0], metrics = train_steps(held[0], batch)
            metrics.wait()

    def read() -> None:
        for batch in calls(streamed, len(source)):
            jax.block_until_ready(batch)

    def train_ahead() -> None:
        with closing(prefetch.ahead(calls(streamed, len(source)))) as batches:
            train(batches)

    in_turn = (lambda: train(calls(resident, len(few))), lambda: train(calls(streamed, len(source))), train_ahead)
    return {"read alone": read} | dict(zip(TRAIN, in_turn, strict=True))


if __name__ == "__main__":
    main()
