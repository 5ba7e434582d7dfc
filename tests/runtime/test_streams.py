"""Standard streams that are closed, that nobody reads, or that lack some letters stop no program."""

import errno
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from diffusion.runtime import streams

ROOT = Path(__file__).parents[2]
# Prints far more than a pipe holds, on every way that the library has; at last says that it came through.
PROGRAM = """
import os, sys, warnings
from diffusion.runtime import streams
streams.guard()
from absl import logging
from tqdm import tqdm
print("1 ± 2")
sys.stdout.flush()
for step in tqdm(range(3), mininterval=0.0):
    print(100_000 * "x", flush=True)
    print(100_000 * "x", file=sys.stderr)
    os.write(1, 100_000 * b"x")  # as a library in C does
    os.write(2, b"x")
    warnings.warn(f"step {step}")
    logging.warning("step %s", step)
with open(sys.argv[1], "w") as file:
    file.write(f"{step} {file.fileno()}")
print("last", end="")
"""


@pytest.mark.parametrize("closed", ["2>&-", "<&- 2>&-", ""])
def test_a_program_comes_through_without_a_reader(tmp_path, closed):
    """As in `python main.py ... 2>&- | head -1`, on a terminal that knows ASCII only."""
    result = tmp_path / "result"
    command = f'"$0" -c "$1" "$2" {closed or "2>&1"} | head -1; exit ${{PIPESTATUS[0]}}'
    arguments = ["bash", "-c", command, sys.executable, PROGRAM, str(result)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(arguments, capture_output=True, env=environment, cwd=tmp_path, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"1 \\xb1 2\n", b"")
    step, descriptor = map(int, result.read_text().split())
    assert step == 2 and descriptor > 2  # no file of the program got a standard stream's descriptor


def nobody_reads():
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def terminal_that_was_closed():
    main, terminal = os.openpty()
    os.close(main)
    return terminal


def full_disk():
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("opened", [nobody_reads, terminal_that_was_closed, full_disk])
@pytest.mark.parametrize("ignored", [streams.GONE, streams.EVERY])
def test_only_a_full_disk_is_told_and_of_stdout_alone(opened, ignored):
    """The result of `--mode=describe > file` must be whole; a run does not end because its log is full."""
    descriptor = opened()
    stream = streams._lasting(None, descriptor, ignored)
    try:
        if opened is full_disk and ignored is streams.GONE:
            with pytest.raises(OSError, match="No space left"):
                print("a line", file=stream, flush=True)
            stream.buffer.raw._ignored = streams.EVERY  # or closing it would raise as well
        else:
            print("a line", file=stream, flush=True)
            if opened is not full_disk:
                assert os.write(descriptor, b"a library's line") == 16
    finally:
        stream.close()
        os.close(descriptor)


@pytest.mark.parametrize("ignored", [streams.GONE, streams.EVERY])
def test_a_full_pipe_that_does_not_block_is_waited_for(ignored):
    """As Node and some CI runners leave it."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    stream, found = streams._lasting(None, writing, ignored), []

    def read_later():
        time.sleep(0.1)
        found.extend(iter(lambda: os.read(reading, 10_000), b""))

    reader = threading.Thread(target=read_later, daemon=True)
    reader.start()
    print(1_000_000 * "x", file=stream)
    stream.close()
    os.close(writing)
    reader.join()
    os.close(reading)
    assert b"".join(found) == 1_000_000 * b"x" + b"\n"


def test_in_a_file_an_error_of_the_disk_is_told(tmp_path):
    with (tmp_path / "table.md").open("w") as file:
        assert streams._gone(file.fileno()) == streams.GONE - {errno.EIO}
    descriptor = terminal_that_was_closed()
    assert streams._gone(descriptor) == streams.GONE
    os.close(descriptor)


def test_streams_that_somebody_replaced_are_left_alone(capsys):
    before = sys.stdout, sys.stderr
    streams.guard()
    assert (sys.stdout, sys.stderr) == before


def test_every_program_guards_its_streams():
    sources = [ROOT / "main.py", *(ROOT / "diffusion").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    programs = {path.name: text for path in sources if "\nif __name__ ==" in (text := path.read_text())}
    assert len(programs) > 10
    bare = [name for name, text in programs.items() if not re.search(r"streams\.guard\(\)|exit_with\(", text)]
    assert not bare
