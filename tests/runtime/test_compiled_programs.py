"""A process finds the programs that an earlier one compiled on the same kind of CPU."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffusion.runtime import compiled_programs

# Compiles for a moment on the CPU that a file describes; prints what JAX reports of its cache.
PROGRAM = """
import pathlib, sys
import jax
from diffusion.runtime import compiled_programs
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
compiled_programs.CPU_INFO = pathlib.Path(sys.argv[1])
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
compiled_programs.keep(on_cpu=True)
f = jax.jit(lambda x: (x @ x.T).sum())
print(float(f(jax.numpy.ones((3, 4)))))
print("hits", events.count("/jax/compilation_cache/cache_hits"))
"""
SAFE_CPU = "model name : one\nflags : fpu sse avx2\n"


def run(cache: Path) -> str:
    """What a process prints that compiles with this cache."""
    known = cache.parent / "cpuinfo"
    known.write_text(SAFE_CPU)
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-c", PROGRAM, str(known)]
    environment |= {"XDG_CACHE_HOME": str(cache)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_next_process_finds_what_was_compiled_and_a_broken_file_costs_a_compilation(tmp_path):
    cache = tmp_path / "cache"
    assert run(cache) == "36.0\nhits 0\n"
    assert run(cache).startswith("36.0\nhits ") and not run(cache).endswith("hits 0\n")
    for program in cache.rglob("*-cache"):
        program.write_bytes(program.read_bytes()[:100])
    assert run(cache) == "36.0\nhits 0\n"


def test_a_cache_that_cannot_be_written_costs_a_warning_only(tmp_path):
    (tmp_path / "cache").write_text("a file, where a folder is needed")
    assert run(tmp_path / "cache") == "36.0\nhits 0\n"


@pytest.mark.parametrize(
    ("on_cpu", "of_the_user", "folder"),
    [(True, None, None), (False, None, "cache/diffusion/compiled"), (False, "elsewhere", "elsewhere")],
)
def test_on_accelerators_there_is_one_folder_and_a_folder_of_the_user_goes_first(
    on_cpu, of_the_user, folder, tmp_path, monkeypatch
):
    config = SimpleNamespace(jax_compilation_cache_dir=of_the_user)
    config.update = lambda name, value: setattr(config, name, value)
    monkeypatch.setattr(compiled_programs, "jax", SimpleNamespace(config=config))
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setattr(compiled_programs, "CPU_INFO", tmp_path / "none")
    compiled_programs.keep(on_cpu)
    assert config.jax_compilation_cache_dir == folder


@pytest.mark.parametrize(
    ("text", "is_kept"),
    [(SAFE_CPU, True), (SAFE_CPU.replace("avx2", "avx512f"), False), ("processor : 0\n", False), (None, False)],
)
def test_programs_are_kept_only_for_cpus_that_are_known_and_safe(text, is_kept, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled_programs, "CPU_INFO", tmp_path / "cpuinfo")
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert (compiled_programs._cpu() is not None) == is_kept


def test_another_cpu_has_another_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled_programs, "CPU_INFO", tmp_path / "cpuinfo")
    folders = set()
    for text in (SAFE_CPU, SAFE_CPU.replace("one", "another"), SAFE_CPU.replace("avx2", "avx"), SAFE_CPU * 2):
        (tmp_path / "cpuinfo").write_text(text)
        folders.add(compiled_programs._cpu())
    assert len(folders) == 3, "more cores are not another CPU"
