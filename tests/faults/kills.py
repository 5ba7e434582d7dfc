"""Kills at random moments: does every run end, bit by bit, where it would have ended?

    python tests/faults/kills.py [NUMBER=50] [--signal=KILL|TERM] [--toy] [--load=0]

Each run of main.py on the digits, 60 steps with a checkpoint every 4, gets one signal at a random moment between its
start and its end. It is then started again. State, metrics.jsonl and summary.json must equal those of a run that was
never stopped. With TERM the time from the signal to the exit is printed too, beside the time of a step. --load=N keeps
N other processes busy meanwhile. About 25 s per kill on 2 CPU cores, 10 s with --toy.
"""

import argparse
import contextlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import launch


@contextlib.contextmanager
def busy(number: int):
    """Keeps `number` processes busy."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for other in others:
            other.kill()


def seconds_to_end(workdir: Path, options: dict) -> float:
    """Runs to the end, however far the run was."""
    started = time.monotonic()
    launch.wait(launch.start(workdir, **options))
    return time.monotonic() - started


def stop(workdir: Path, after: float, number: signal.Signals, options: dict) -> float | None:
    """Starts a run and sends the signal `after` so many seconds; the seconds to the exit, None if it had ended."""
    running = launch.start(workdir, **options)
    with contextlib.suppress(subprocess.TimeoutExpired):
        running.wait(after)
        return None
    sent = time.monotonic()
    running.send_signal(number)
    code = running.wait(600)
    # Before it is ready for signals, Python ends by the signal itself; nothing has been trained then.
    assert code in ({-number} if number == signal.SIGKILL else {75, -number, 0}), code
    return time.monotonic() - sent


def main(number: int, kind: signal.Signals, toy: bool, load: int, root: Path) -> None:
    """Prints how many of `number` killed runs ended as the one that was not killed."""
    options = {"toy": True, "train.num_steps": 300, "train.checkpoint_every": 20} if toy else {}
    rng, equal, delays = random.Random(0), 0, []
    seconds_to_end(root / "compile", options)
    seconds = seconds_to_end(root / "straight", options)
    wanted = launch.end(root / "straight")
    with busy(load):
        for trial in range(number):
            workdir = root / str(trial)
            delay = stop(workdir, rng.uniform(0, seconds), kind, options)
            delays += [] if delay is None else [delay]
            seconds_to_end(workdir, options)
            equal += launch.end(workdir) == wanted
            print(f"{equal} of {trial + 1} ends are bit-identical", flush=True)
    print(
        f"{number} kills with SIG{kind.name.removeprefix('SIG')}, {seconds:.0f} s per run: {equal} bit-identical ends"
    )
    if kind == signal.SIGTERM and delays:
        print(f"from SIGTERM to the exit: median {sorted(delays)[len(delays) // 2]:.2f} s, at most {max(delays):.2f} s")
    assert equal == number


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", type=int, nargs="?", default=50)
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--load", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kind = signal.Signals[f"SIG{arguments.signal}"]
        main(arguments.number, kind, arguments.toy, arguments.load, Path(folder))
