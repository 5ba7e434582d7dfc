"""Freed memory stays with the process where that is safe. Elsewhere malloc is left alone."""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion.runtime import allocator

ROOT = Path(__file__).resolve().parents[2]
ON_GLIBC = pytest.mark.skipif(not allocator._is_glibcs(), reason="needs glibc's own malloc")
# The bytes are also made in a thread of their own: the heap of a new thread would be too small for 40 MiB.
PROGRAM = """
import resource, threading
from diffusion.runtime import allocator
import jax, jax.numpy as jnp
import numpy as np
kept = allocator.keep_freed_memory()

size = 40 * 2**20
start = jnp.ones(size // 4)
program = jax.jit(lambda x: jax.lax.scan(lambda x, _: (jnp.roll(x, 1) * 2, None), x, length=3)[0].sum())
found = []

def faults_of_a_call(call):
    counts = []
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        call()
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    found.append(int(np.median(counts[10:])))  # the heap has found its size

faults_of_a_call(lambda: program(start).block_until_ready())
thread = threading.Thread(target=faults_of_a_call, args=[lambda: b"x" * size])
thread.start()
thread.join()
print(int(kept), *found)
"""


def page_faults(**environment: str) -> tuple[bool, list[int]]:
    """Whether memory is kept in a fresh process, and the page faults of 40 MiB there: by XLA, and in a new thread."""
    rest = {name: value for name, value in os.environ.items() if name not in (allocator.SWITCH, "XLA_FLAGS")}
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, cwd=ROOT, env=rest | environment, check=True, capture_output=True, text=True)
    kept, *found = map(int, result.stdout.split())
    return bool(kept), found


@ON_GLIBC
def test_memory_that_was_freed_is_not_fetched_again():
    """A page is 4 KiB, or 2 MiB where the system chooses large ones."""
    kept, few = page_faults()
    untouched, many = page_faults(**{allocator.SWITCH: "0"})
    assert kept and not untouched
    assert all(40 // 2 <= count for count in many), many
    assert all(10 * after < before for after, before in zip(few, many, strict=True)), (few, many)


@pytest.fixture
def told(monkeypatch) -> list:
    """What malloc is told, which this process's malloc does not hear; and nothing is set."""
    for name in (allocator.SWITCH, "GLIBC_TUNABLES", *(name for name in os.environ if name.startswith("MALLOC_"))):
        monkeypatch.delenv(name, raising=False)
    calls = []

    class Process:
        malloc = ctypes.CDLL(None).malloc

        def mallopt(self, *call):
            calls.append(call)
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Process())
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    return calls


def test_malloc_keeps_large_memory_in_one_heap_that_never_shrinks(told):
    """The numbers of M_ARENA_MAX, M_MMAP_MAX and M_TRIM_THRESHOLD in glibc's malloc.h."""
    assert allocator.keep_freed_memory()
    assert told == [(-8, 1), (-4, 0), (-1, -1)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (allocator.SWITCH, "0"),
        ("GLIBC_TUNABLES", "glibc.rtld.nns=3:glibc.malloc.hugetlb=1"),
        ("MALLOC_ARENA_MAX", "2"),
    ],
)
def test_what_the_user_set_is_left_alone(name, value, told, monkeypatch):
    monkeypatch.setenv(name, value)
    assert not allocator.keep_freed_memory() and not told


@pytest.mark.parametrize(("name", "value"), [(allocator.SWITCH, "1"), ("GLIBC_TUNABLES", "glibc.rtld.nns=3")])
def test_what_has_nothing_to_do_with_it_does_not_turn_it_off(name, value, told, monkeypatch):
    monkeypatch.setenv(name, value)
    assert allocator.keep_freed_memory() and told


def test_another_c_library_is_left_alone(told, monkeypatch):
    """musl, macOS and Windows, where Python finds no version of glibc."""
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not allocator.keep_freed_memory() and not told


OTHER_MALLOC = """
#include <stddef.h>
extern void *__libc_malloc(size_t);
void *malloc(size_t size) { return __libc_malloc(size); }
"""


@ON_GLIBC
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_another_malloc_that_is_preloaded_is_left_alone(tmp_path):
    source, library = tmp_path / "other.c", tmp_path / "libother.so"
    source.write_text(OTHER_MALLOC)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    ask = "from diffusion.runtime import allocator; print(allocator.keep_freed_memory())"
    for preloaded, kept in (("", "True"), (str(library), "False")):
        environment = os.environ | {"LD_PRELOAD": preloaded}
        result = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.stdout.strip() == kept, result.stderr


ASK = """
import sys
from diffusion.runtime import allocator



def keep():
    bridge = sys.modules.get("jax._src.xla_bridge")
    print("kept", "too late" if bridge and bridge.backends_are_initialized() else "in time")


allocator.keep_freed_memory = keep
"""


@pytest.mark.parametrize("package", ["experiments", "benchmarks"])
def test_studies_and_benchmarks_keep_memory_before_jax_has_devices(package):
    command = [sys.executable, "-c", f"{ASK}import {package}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "kept in time\n", result.stderr


@pytest.mark.parametrize(("batch_size", "kept"), [(63, ""), (64, "kept in time\n")])
def test_main_keeps_memory_where_the_maps_are_large_and_before_jax_has_devices(batch_size, kept):
    """64 images of 8×8 pixels in 32 channels are 512 KiB. --input ends it before anything is computed."""
    run = f"{ASK}import runpy; runpy.run_path('main.py', run_name='__main__')"
    flags = ["--config=configs/digits.py", f"--config.train.batch_size={batch_size}", "--input=none"]
    result = subprocess.run([sys.executable, "-c", run, *flags], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == kept and "--input=none has no effect in --mode=train" in result.stderr


def test_data_that_do_not_exist_are_no_matter_of_memory():
    run = f"{ASK}import runpy; runpy.run_path('main.py', run_name='__main__')"
    flags = ["--config=configs/digits.py", "--config.data.name=nothing", "--input=none"]
    result = subprocess.run([sys.executable, "-c", run, *flags], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "" and "Traceback" not in result.stderr and result.returncode == 2
