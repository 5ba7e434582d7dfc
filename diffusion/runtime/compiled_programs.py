"""Compiled programs that the next process finds, so that it does not compile them again.

JAX writes its cache's files in place: a process that is killed meanwhile leaves a broken one, which stays. And a
program for one CPU may not run on the next that reads the same home directory. So on CPUs every process has a folder
of its own, of links to the common one's programs, and adds what is new to the common folder when it ends. There is a
common folder for each model of CPU and each jaxlib.
"""

import contextlib
import hashlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jaxlib

from diffusion.runtime import files

CPU_INFO = Path("/proc/cpuinfo")
# On such CPUs XLA prints an error for every kernel that it reads back: https://github.com/jax-ml/jax/issues/38445.
UNSAFE = "avx512f"


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """While it lasts, JAX finds and keeps compiled programs in `files.cache_directory()`.

    JAX_COMPILATION_CACHE_DIR goes before it. Nothing is kept for CPUs that are UNSAFE or that Linux does not describe.
    """
    folder = files.cache_directory() / "compiled"
    with contextlib.ExitStack() as stack:
        if not jax.config.jax_compilation_cache_dir and jax.default_backend() != "cpu":
            jax.config.update("jax_compilation_cache_dir", str(folder))
        elif not jax.config.jax_compilation_cache_dir and (cpu := _cpu()):
            with contextlib.suppress(OSError):  # there is no room for a folder: then nothing is kept
                stack.enter_context(_of_this_process(folder / cpu))
        yield


def _cpu() -> str | None:
    """A digest of what a program for this CPU depends on; None where programs are not kept."""
    if not CPU_INFO.exists():
        return None
    lines = CPU_INFO.read_text().splitlines()
    facts = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    if not facts or any(UNSAFE in line.split() for line in facts):
        return None
    return hashlib.sha256("\n".join([*facts, jaxlib.__version__]).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _of_this_process(common: Path) -> Iterator[None]:
    """JAX's cache in a folder that starts with the common one's programs and leaves its new ones there."""
    with tempfile.TemporaryDirectory(prefix="diffusion-compiled-", ignore_cleanup_errors=True) as name:
        for program in common.glob("*-cache"):
            (Path(name) / program.name).symlink_to(program)
        jax.config.update("jax_compilation_cache_dir", name)
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # its folder would be part of the key
        try:
            yield
        finally:
            jax.config.update("jax_compilation_cache_dir", None)
            try:
                _publish(Path(name), common)
            except OSError as error:  # a home directory that is full or cannot be written
                logging.getLogger(__name__).warning("compiled programs are not kept: %s", error)


def _publish(own: Path, common: Path) -> None:
    for program in own.glob("*-cache"):
        if not program.is_symlink():
            common.mkdir(parents=True, exist_ok=True)
            with files.replacing(common / program.name) as file:
                file.write(program.read_bytes())
