"""The folder in which JAX keeps compiled programs, so that the next process need not compile them again.

A program for one CPU may not run on another that reads the same home directory, and JAX does not distinguish CPUs. So
there is a folder for each model of CPU. The rest is JAX's own cache. If a killed process leaves a file half written,
JAX warns and compiles the program again.
"""

import contextlib
import hashlib
from pathlib import Path

import jax

from diffusion.runtime import files

CPU_INFO = Path("/proc/cpuinfo")
# On such CPUs XLA prints an error for every kernel that it reads back: https://github.com/jax-ml/jax/issues/38445.
UNSAFE = "avx512f"


def keep(on_cpu: bool) -> None:
    """Makes JAX keep compiled programs in `files.cache_directory()`, unless JAX_COMPILATION_CACHE_DIR names a folder.

    Programs are not kept for CPUs that are UNSAFE or that Linux does not describe, or without a home directory.

    Args:
        on_cpu: whether the programs are for a CPU.
    """
    cpu = _cpu() if on_cpu else ""
    if cpu is not None and not jax.config.jax_compilation_cache_dir:
        with contextlib.suppress(FileNotFoundError):
            jax.config.update("jax_compilation_cache_dir", str(files.cache_directory() / "compiled" / cpu))


def _cpu() -> str | None:
    """A digest of what a program for this CPU depends on; None where programs are not kept."""
    if not CPU_INFO.exists():
        return None
    lines = CPU_INFO.read_text().splitlines()
    facts = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    if not facts or any(UNSAFE in line.split() for line in facts):
        return None
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
