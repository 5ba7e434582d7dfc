"""A preparation that is killed at any step, or whose processes are, ends like an undisturbed one."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import command, files_of, last_error, plain_folder, run, undisturbed

from diffusion.data import tfds as prepared
from diffusion.data.folder import shards

# The command in a child that kills itself before its `step`th event that changes or reads the data_dir, then once more
# to its end; for every step.
KILLS_AT_EVERY_STEP = """
import os, signal, sys
from pathlib import Path
from diffusion.data import tfds
from diffusion.data.folder import __main__ as program
from diffusion.data.folder import shards
from array_record.python import array_record_module
from PIL import Image

pictures, root = Path(sys.argv[1]), Path(sys.argv[2])
shards.PICTURES_PER_SHARD = 6
os.fsync = lambda file: None  # slow, and for power failures only
Image.init()
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
tfds.is_own("pets")

def run(data_dir, killed_before=None):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = 0

    def watch(event, arguments):
        nonlocal count
        if event in EVENTS and str(data_dir) in str(arguments[0]):
            if count == killed_before:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(watch)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    os._exit(program.main([*arguments, f"--data-dir={data_dir}"]))

def content(data_dir):
    return {path.relative_to(data_dir): path.read_bytes() for path in data_dir.rglob("*") if path.is_file()}

arguments = [str(pictures), "--name=pets", "--size=8", "--workers=1", "--test-fraction=0.3"]
assert run(root / "straight") == 0
wanted, step, unfinished = content(root / "straight"), 0, 0
while True:
    data_dir = root / str(step)
    code = run(data_dir, step)
    if tfds.find("pets", data_dir) is None:
        unfinished += 1
    else:  # what is found is complete, whatever else lies beside it
        assert content(data_dir / "pets" / "1.0.0") == content(root / "straight" / "pets" / "1.0.0"), step
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    assert run(data_dir) == 0, step
    assert content(data_dir) == wanted, step
    step += 1
print('steps', step, unfinished)
"""


def test_killed_at_every_step_the_end_is_the_same(tmp_path):
    pictures = plain_folder(tmp_path / "pictures", 12)
    arguments = [sys.executable, "-c", KILLS_AT_EVERY_STEP, str(pictures), str(tmp_path / "data")]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps, unfinished = map(int, done.stdout.split()[-2:])
    assert steps > 30 and unfinished > 20


def started(program, pictures, root):
    """The command with two workers, in a process group of its own."""
    arguments = command(pictures, root, "--test-fraction=0.3", "--workers=2")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *program, *arguments], start_new_session=True, **pipes)


def test_the_command_with_two_workers_writes_the_same_bytes(tmp_path):
    pictures = plain_folder(tmp_path / "pictures")
    process = started(["-m", "diffusion.data.folder"], pictures, tmp_path / "data")
    printed, errors = process.communicate()
    assert process.returncode == 0 and "prepared: " in printed, errors
    assert "Traceback" not in errors and "Warning" not in errors
    assert files_of(tmp_path / "data" / "pets" / "1.0.0") == undisturbed(pictures, tmp_path / "straight")


# Small shards, and no look at the project's own data sets, which takes longer than all else.
SMALL_SHARDS = """
import runpy
from diffusion.data import tfds
from diffusion.data.folder import shards
shards.PICTURES_PER_SHARD = 4
tfds.is_own = lambda name: False
runpy.run_module("diffusion.data.folder", run_name="__main__")
"""


def stop(process, after, number, whole_group):
    """Sends a signal so many seconds after the work began; what was printed, once no process of the group is left."""
    for line in process.stdout:  # to its end, if there is nothing left to do
        if line.startswith("result: "):
            break
    time.sleep(after)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=60)  # waits for the workers as well, which hold the other ends of the pipes
    return errors


def finish(pictures, root):
    process = started(["-c", SMALL_SHARDS], pictures, root)
    assert process.wait() == 0, process.stderr.read()
    return files_of(root)


@pytest.fixture
def straight(tmp_path, monkeypatch):
    """A folder of 40 pictures, and the files of a preparation in ten shards that was not stopped."""
    pictures = plain_folder(tmp_path / "pictures", 40)
    monkeypatch.setattr(shards, "PICTURES_PER_SHARD", 4)
    assert run(pictures, tmp_path / "straight", "--test-fraction=0.3") == 0
    return pictures, files_of(tmp_path / "straight")


# After the first shard it does not go on, so that no signal comes too late. And where a script's shell started the
# tests in the background, they and all their children ignore SIGINT.
FIRST_SHARD_ONLY = SMALL_SHARDS.replace(
    "runpy.run_module",
    """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)

def first_only(futures, as_completed=shards.as_completed):
    yield next(as_completed(futures))
    time.sleep(600)

shards.as_completed = first_only
runpy.run_module""",
)


def test_signals_stop_it_in_one_line_and_a_kill_leaves_no_worker(straight, tmp_path):
    pictures, wanted = straight
    root, codes = tmp_path / "data", []
    for number, whole_group in ((signal.SIGKILL, False), (signal.SIGTERM, False), (signal.SIGINT, True)):
        process = started(["-c", FIRST_SHARD_ONLY], pictures, root)
        errors = stop(process, 0.3, number, whole_group)
        codes.append(process.returncode)
        if number != signal.SIGKILL:
            lines = [line for line in errors.splitlines() if line.strip()]  # a progress bar that ends leaves blanks
            assert lines[-1] == "stopped; the same command goes on", (process.returncode, errors)
            assert "Traceback" not in errors and "Warning" not in errors
        assert prepared.find("pets", root) is None
    assert codes == [-signal.SIGKILL, os.EX_TEMPFAIL, os.EX_TEMPFAIL]
    assert finish(pictures, root) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_end_is_the_same(straight, tmp_path, kills):
    pictures, wanted = straight
    root, moments = tmp_path / "data", np.random.default_rng(kills).uniform(0, 3, kills)
    for moment in moments:
        process = started(["-c", SMALL_SHARDS], pictures, root)
        stop(process, moment, signal.SIGKILL, whole_group=True)
        found = prepared.find("pets", root)
        assert found is None or files_of(found) == {path.removeprefix("pets/1.0.0/"): wanted[path] for path in wanted}
    assert finish(pictures, root) == wanted


def test_a_killed_worker_is_told(straight, tmp_path, monkeypatch, capsys):
    pictures, wanted = straight
    original = shards.as_completed

    def as_completed(futures):
        for child in multiprocessing.active_children():
            child.kill()
        return original(futures)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "as_completed", as_completed)
        assert run(pictures, tmp_path / "data", "--test-fraction=0.3", "--workers=2") == 2
    assert "error: a worker process was killed" in last_error(capsys)
    assert run(pictures, tmp_path / "data", "--test-fraction=0.3") == 0
    assert files_of(tmp_path / "data") == wanted
