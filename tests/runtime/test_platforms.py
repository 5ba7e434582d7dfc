"""Other systems: features that macOS and Windows lack are hidden, and file systems have no locks."""

import errno
import os
import runpy
import sys

import pytest

from benchmarks import timing
from diffusion.runtime import files, streams


@pytest.fixture
def windows(monkeypatch):
    for name in ("fcntl", "pwd", "grp", "resource"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(streams.importlib.util, "find_spec", lambda name: None)


def test_windows_is_refused_in_one_line_by_what_every_program_calls_first(windows, capsys):
    with pytest.raises(SystemExit) as ended:
        streams.guard()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: this needs Linux or macOS; on Windows, run it in WSL 2\n"


@pytest.mark.parametrize("module", ["files", "preemption", "streams"])
def test_modules_can_be_imported_where_windows_lacks_others(windows, monkeypatch, module):
    """Or a program would end with an ImportError before it says why."""
    monkeypatch.delattr(os, "EX_TEMPFAIL")
    runpy.run_path(files.__file__.replace("files.py", f"{module}.py"))


def test_macos_counts_cores_without_affinity(monkeypatch):
    assert timing.num_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert timing.num_cores() == os.cpu_count()


def test_a_file_system_without_locks_is_one_line_and_can_be_overridden(tmp_path, monkeypatch):
    def refused(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refused)
    line = rf"^{tmp_path}: its file system has no locks \(No locks available\); if no other .* DIFFUSION_LOCK=0 goes on"
    with pytest.raises(OSError, match=line), files.locked(tmp_path, "wait"):
        pass
    monkeypatch.setenv("DIFFUSION_LOCK", "0")
    with files.locked(tmp_path, "wait"):
        assert (tmp_path / files.LOCK).read_text().startswith(f"process {os.getpid()} on ")


def test_the_override_does_not_break_a_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_LOCK", "0")
    with files.locked(tmp_path, "wait"), pytest.raises(ValueError, match="is in use by process .*; wait$"):
        with files.locked(tmp_path, "wait"):
            pass
