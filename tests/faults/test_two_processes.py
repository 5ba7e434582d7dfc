"""Two processes as one run: only process 0 writes, both agree on what is missing, and a signal stops both."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import launch
import numpy as np
import pytest
import toy

from diffusion import data
from diffusion.programs import train

HERE = Path(__file__).parent
KEYS = ("--train.num_steps=10", "--train.checkpoint_every=10", "--sample.num_images=24", "--sample.batch_size=16")


class Run(NamedTuple):
    process: subprocess.Popen
    printed: Path  # a file, because a pipe that nobody reads is full in the end, and stops the process


def start(mode: str, workdir: Path, *flags: str) -> Run:
    environment = launch.environment(2) | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])])}
    command = [sys.executable, str(HERE / "toy_program.py"), mode, str(workdir), *KEYS, *flags]
    handle, printed = tempfile.mkstemp(".txt", f"{mode}-", workdir.parent)
    with open(handle, "w") as file:
        return Run(subprocess.Popen(command, env=environment, stdout=file, stderr=file), Path(printed))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start_two(mode: str, workdir: Path, *flags: str) -> list[Run]:
    of_both = (f"--coordinator=localhost:{free_port()}", "--num_processes=2", *flags)
    return [start(mode, workdir, *of_both, f"--process_id={i}") for i in range(2)]


def finish(*running: Run, code: int = 0) -> None:
    for process, printed in running:
        assert process.wait(timeout=240) == code, printed.read_text()


@pytest.fixture(scope="module")
def alone(layer, tmp_path_factory):
    """A run of one process, this one: trained, sampled and scored."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    keys = {flag.lstrip("-").split("=")[0].replace(".", "__"): int(flag.split("=")[1]) for flag in KEYS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", toy.load)
        patch.setattr(data, "describe", toy.describe)
        train.run(toy.config(**keys), directory)
    return directory


def read(path: Path):
    return json.loads(path.read_text())


def test_two_processes_train_sample_and_score_as_one_does(alone, tmp_path):
    """The two read their shares of the images from disk; the one keeps all images on its devices."""
    finish(*start_two("train", tmp_path / "run", "--data.placement='disk'"))
    one, two = read(alone / "summary.json"), read(tmp_path / "run" / "summary.json")
    # The sums over four devices are added in another order than those over eight.
    assert abs(one["test_bpd"] - two["test_bpd"]) < 1e-4 * one["test_bpd"]
    images, again = (np.load(run / "samples.npz")["images"] for run in (alone, tmp_path / "run"))
    assert images.shape == again.shape and np.mean(images != again) < 0.01
    # The folder of the samples ends with a digest of the weights.
    files, again = ({path.name for path in run.rglob("*.npz")} for run in (alone, tmp_path / "run"))
    assert files == again


def test_a_finished_run_is_finished_for_both_and_scoring_that_a_signal_stopped_goes_on(alone, tmp_path):
    run = Path(shutil.copytree(alone, tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    few_at_a_time = "--eval.batch_size=4"  # 400 batches, so that the signal comes between two of them
    both = start_two("train,evaluate", run, few_at_a_time)
    deadline = time.monotonic() + 120
    while not list(run.glob("evaluations/*/unfinished_eval/*/test.npy")):
        assert time.monotonic() < deadline and both[0].process.poll() is None
        time.sleep(0.01)
    both[1].process.send_signal(signal.SIGTERM)
    finish(*both, code=75)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    (kept,) = run.glob("evaluations/*/unfinished_eval/*/test.npy")
    assert np.isnan(np.load(kept)).any() and not (run / "eval.json").exists()
    finish(*start_two("evaluate", run, few_at_a_time))
    scored, summary = read(run / "eval.json"), read(run / "summary.json")
    assert abs(scored["test_bpd"] - summary["test_bpd"]) < 1e-5 * summary["test_bpd"]
    assert not list(run.glob("evaluations/*/unfinished_eval"))


IN_PARTS = """
import sys
from diffusion.runtime import processes

processes.join(sys.argv[1], 2, int(sys.argv[2]))
begun = []

def total(parts):
    numbers = []
    for part in parts:
        begun.append(part)
        numbers.append(12 // part)  # fails for 0
    return sum(numbers)

for parts, stop_at in [([1, 2, 3], 9), ([1, 2, 3], 2), ([4, 0, 5], 9), ([], 9), ([6], 9)]:
    asked = iter(range(9))
    try:
        print(processes.on_first_in_parts(total, parts, lambda: next(asked) == stop_at))
    except Exception as error:
        print(type(error).__name__, error)
print(begun)
"""


def test_work_of_process_0_stops_between_two_parts_for_both():
    """In order: all parts, a stop before the third one, an error in the second one, no part, one part."""
    at = f"localhost:{free_port()}"
    command = [sys.executable, "-c", IN_PARTS, at]
    environment = launch.environment(1) | {"PYTHONPATH": str(HERE.parents[1])}
    pair = [subprocess.Popen([*command, str(i)], env=environment, stdout=subprocess.PIPE, text=True) for i in range(2)]
    printed = [process.communicate(timeout=120)[0].splitlines() for process in pair]
    first, second = ([line for line in lines if not line.startswith("[Gloo]")] for lines in printed)
    error = "integer division or modulo by zero"
    assert first == ["22", "Stopped ", f"ZeroDivisionError {error}", "0", "2", "[1, 2, 3, 1, 2, 4, 0, 6]"]
    failed = f"ValueError process 0 failed: ZeroDivisionError: {error}"
    assert second == ["None", "Stopped ", failed, "None", "None", "[]"]
