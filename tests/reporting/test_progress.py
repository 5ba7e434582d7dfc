"""Progress on a terminal and in a log file."""

import sys
import time

import pytest

from diffusion.reporting import progress as progress_module
from diffusion.reporting.progress import Progress


def test_progress_in_a_log_file_is_lines_and_few_of_them(capsys):
    with Progress(1000, initial=200, desc="train") as progress:
        for _ in range(800):
            progress.set_postfix({"loss": "0.25"}, refresh=False)
            progress.update(1)
    lines = [line for line in capsys.readouterr().err.replace("\r", "").splitlines() if line.strip()]
    assert len(lines) == 2 and lines[0].startswith("train: 200/1000")
    assert "1000/1000" in lines[-1] and "loss=0.25" in lines[-1] and "step/s" in lines[-1]


def test_other_processes_than_0_show_nothing(capsys, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with Progress(2, desc="train") as progress:
        progress.update(2)
    assert capsys.readouterr().err == ""


@pytest.fixture
def now(monkeypatch):
    """The time in seconds, which the test sets: now[0]."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_compiling_is_one_line_of_a_log_file_and_left_out_of_the_time_left(now, capsys):
    with Progress(100, desc="train") as progress:
        for _ in range(3):
            with progress.compiling(program=1):
                now[0] += 30.0 if progress.n == 0 else 2.0
            progress.update(1)
        assert progress.format_dict["elapsed"] == 4.0, "30 s of compiling do not count, two steps of 2 s do"
        with progress.compiling(program=10):
            now[0] += 0.5
        assert progress.format_dict["elapsed"] == 4.0
    words = [line for line in capsys.readouterr().err.replace("\r", "").splitlines() if "compiling" in line]
    assert words == ["train: compiling took 30 s"], "neither a second call nor a quick compilation has a line"


def test_on_a_terminal_the_bar_says_how_long_it_compiles(monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "QUICK_SECONDS", 0.01)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(100, desc="train") as progress, progress.compiling():
        time.sleep(0.2)
    assert "train: compiling, 0 s" in capsys.readouterr().err


def test_an_error_while_compiling_ends_the_bar_too(capsys):
    with pytest.raises(MemoryError), Progress(100, desc="train") as progress, progress.compiling():
        raise MemoryError
    assert "compiling took" not in capsys.readouterr().err
