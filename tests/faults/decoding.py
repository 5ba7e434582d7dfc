"""Two processes of one host decode one data set and are killed repeatedly: it is decoded once, to the same bytes.

    python tests/faults/decoding.py [KILLS]

Both begin together. One or both get SIGKILL or SIGTERM at a random moment, and both begin again. If only one was
killed, the other takes over. They are forked from this process, so a start costs no imports; the threads of
array_record must not have begun by then.
"""

import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from diffusion import data
from diffusion.data import stored_split, unfinished
from diffusion.runtime import files
from diffusion.runtime.preemption import EXIT_CODE, Preempted, Preemption

PART_SECONDS = 0.02  # so long one part of 20 pictures takes, of 75
LIMIT_SECONDS = 60


def start(root: Path, log: Path) -> int:
    """The id of a process that loads the set; each part that it decodes is a line of the log."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # until it is handled
    process = os.fork()
    if process:
        return process
    signal.alarm(LIMIT_SECONDS)
    stored_split.RECORDS_PER_READ, unfinished.SAVE_SECONDS, files.WAIT_SECONDS = 20, 0.05, 0.01
    examples = stored_split._examples

    def slow(*arguments):
        for part in examples(*arguments):
            time.sleep(PART_SECONDS)
            with log.open("a") as lines:
                print(os.getpid(), file=lines)
            yield part

    stored_split._examples = slow
    try:
        with Preemption() as preemption, preemption.at_points():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
            data.load("digits", "train", str(root))
    except Preempted:
        os._exit(EXIT_CODE)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def codes(pair: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in pair]


def clear(root: Path) -> None:
    for path in [*root.rglob("decoded-train-*"), *root.rglob("classes-train-*")]:
        path.unlink()


def pixels_of(root: Path) -> bytes:
    (path,) = root.rglob("decoded-train-*.npy")
    (classes,) = root.rglob("classes-train-*.npy")
    return path.read_bytes() + classes.read_bytes()


def main(num_kills: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        root, log = Path(name) / "data", Path(name) / "log"
        assert (ended := codes([start(root, log) for _ in range(2)])) == [0, 0], ended
        straight, lines = pixels_of(root), log.read_text().split()
        assert len(lines) == 75 and len(set(lines)) == 1, "both decoded"
        rng, ends = random.Random(0), []
        clear(root)
        log.write_text("")
        for number in range(num_kills):
            pair = [start(root, log) for _ in range(2)]
            time.sleep(rng.uniform(0.1, 0.4))
            killed = pair if number % 2 else [rng.choice(pair)]
            for process in killed:
                os.kill(process, rng.choice([signal.SIGKILL, signal.SIGTERM]))
            if len(killed) == 1:  # the other one goes on
                time.sleep(0.1)
                os.kill((set(pair) - set(killed)).pop(), signal.SIGKILL)
            ends += codes(pair)
        assert set(ends) <= {-signal.SIGKILL, EXIT_CODE, 0}, ends
        assert (ended := codes([start(root, log) for _ in range(2)])) == [0, 0], ended
        assert pixels_of(root) == straight, "other bytes"
        left = sorted(path.name.partition(".")[2] for path in root.rglob("*-train-*"))
        assert left == ["npy", "npy", "npy.records"], f"left over: {left}"
        again = len(log.read_text().split()) - 75
        print(f"{num_kills} kills of two processes: one decoding, the same bytes ({again} of 75 parts decoded again)")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
