"""The same run on 1 process × 4 devices, on 2 × 2, and moved from 4 devices to 2 and to 1: do the ends agree?

    python tests/faults/several_processes.py [--toy] [--workdir=DIR]

Prints the largest difference of a parameter, relative to the largest parameter: the effect of another order of sums.
--toy takes a network of one layer, except for the errors that main.py prints.
"""

import argparse
import re
import signal
import tempfile
from pathlib import Path

import launch
import numpy as np

STEPS = 12
TOLERANCE = 1e-4


def parameters(workdir: Path) -> dict[str, np.ndarray]:
    """The last state's parameters by their paths."""
    import orbax.checkpoint as ocp
    from flax.traverse_util import flatten_dict

    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore((workdir / "checkpoints" / str(STEPS) / "state").absolute())
    return {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(tree["params"]).items()}


def compare(one: Path, other: Path, words: str) -> float:
    """Prints and returns the largest difference of a parameter, relative to the largest parameter."""
    a, b = parameters(one), parameters(other)
    difference = max(np.abs(a[name] - b[name]).max() for name in a) / max(np.abs(leaf).max() for leaf in a.values())
    print(f"{words}, {STEPS} steps: relative difference of the parameters {difference:.1e}", flush=True)
    assert a.keys() == b.keys() and difference < TOLERANCE
    return difference


def processes(root: Path, **options) -> None:
    """2 × 2 devices against 1 × 4; then a SIGTERM to one process of two."""
    launch.wait(launch.start(root / "one", 4, **options))
    launch.wait(*launch.start_two(root / "two", 2, **options))
    compare(root / "one", root / "two", "2 processes × 2 devices against 1 × 4")
    written = [{path.name for path in (root / name).iterdir()} for name in ("one", "two")]
    assert written[0] == written[1], written

    pair = launch.start_two(root / "stopped", 2, **options | {"train.num_steps": 100_000})
    launch.until_saved(root / "stopped", 4)
    pair[1].send_signal(signal.SIGTERM)
    launch.wait(*pair, code=75)
    print("SIGTERM to one process of two: both saved the same step and ended with exit code 75", flush=True)

    pair = launch.start_two(root / "two", 2, **options | {"seed": 1})
    launch.wait(*pair, code=2 if "toy" not in options else 1)
    print("a workdir that process 0 refuses: both refused it", flush=True)


def failures(root: Path, **options) -> None:
    """Process 0 of two fails, where the other hears of it and where it cannot; main.py even with --toy."""
    options = {name: value for name, value in options.items() if "." in name} | {"train.num_steps": 100_000}
    no_room(root / "full", **options)
    failing_alone(root / "alone", **options)


def no_room(workdir: Path, **options) -> None:
    """Process 0 cannot write its next checkpoint."""
    pair = launch.start_two(workdir, 1, **options)
    launch.until_saved(workdir, 4)
    launch.limit_files(pair[0], launch.half_a_checkpoint(workdir))
    launch.wait(*pair, code=2, seconds=120)
    printed = launch.log(workdir).read_text()
    errors = re.findall(r"^error: the checkpoint of step \d+ could not be written to .*$", printed, re.MULTILINE)
    assert len(errors) == 2 and errors[0] == errors[1] and "Traceback" not in printed, printed
    print("process 0 has no room for a checkpoint: both printed that error and ended with exit code 2", flush=True)


def failing_alone(workdir: Path, **options) -> None:
    """Process 0 cannot write its next row of metrics, of which the other hears nothing."""
    first, second = launch.start_two(workdir, 1, **options)
    launch.until_saved(workdir, 4)
    launch.limit_files(first, (workdir / "metrics.jsonl").stat().st_size)
    launch.wait(first, code=2, seconds=120)
    assert second.wait(120) != 0
    printed = launch.log(workdir).read_text()
    assert re.search(r"^error: the metrics of step \d+ could not be written to ", printed, re.MULTILINE), printed
    print("process 0 alone has no room for its metrics: it said so and ended with 2; JAX ended the other", flush=True)


def topologies(root: Path, **options) -> None:
    """A run stopped on 4 devices goes on on 2 and then on 1, and the reverse; root/one ran on 4 throughout."""
    for name, (first, second, third) in (("down", (4, 2, 1)), ("up", (1, 2, 4))):
        launch.wait(launch.start(root / f"{name}-1", first, **options))
        launch.cut(root / f"{name}-1", root / f"{name}-2", 4)
        launch.wait(launch.start(root / f"{name}-2", second, **options))
        launch.cut(root / f"{name}-2", root / f"{name}-3", 8)
        launch.wait(launch.start(root / f"{name}-3", third, **options))
        compare(root / "one", root / f"{name}-3", f"{first} → {second} → {third} devices against 4")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--workdir", type=Path, help="kept; by default a temporary folder")
    arguments = parser.parse_args()
    options = {"train.num_steps": STEPS, "train.checkpoint_every": 4, "train.log_every": 3}
    if arguments.toy:
        options |= {"toy": True, "train.check_replicas_every": 4}
    with tempfile.TemporaryDirectory() as temporary:
        for study in (processes, failures, topologies):
            study(arguments.workdir or Path(temporary), **options)
