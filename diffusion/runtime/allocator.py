"""Freed memory stays with the process: XLA's CPU temporaries are then not fetched from the system at every call."""

import ctypes
import os
import platform

SWITCH = "DIFFUSION_KEEP_FREED_MEMORY"  # 0 leaves the allocator as it is
# Bytes of the first map of a batch, from which on `main.py` keeps freed memory: docs/reliability.md has the times.
LARGE_MAP = 512 * 1024
# glibc's malloc.h; see mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to keep what is freed; to be called before JAX starts its devices.

    On a CPU XLA allocates the temporaries of a compiled program at every call and frees them at its end. By default
    glibc returns large ones to the system, which must then clear and map every page anew. Here large allocations come
    from the heap as well, the heap never shrinks, and all threads share it, since the heaps of further threads are
    too small for large allocations. That holds for threads that start later. In return the process stays as large as
    it once was.

    On an accelerator the temporaries are in the device's memory, and CUDA allocates pinned host memory itself. What
    malloc hands out there are batches and results, so little is gained or lost.

    Returns:
        Whether malloc was told. It is left alone where DIFFUSION_KEEP_FREED_MEMORY is 0, where the user has set it
        by GLIBC_TUNABLES or MALLOC_..., where another library has replaced it (jemalloc or tcmalloc by LD_PRELOAD),
        and where the C library is not glibc.
    """
    if os.environ.get(SWITCH) == "0" or _is_set_by_the_user() or not _is_glibcs():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(_M_ARENA_MAX, 1), mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1)])


def _is_set_by_the_user() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return "glibc.malloc." in tunables or any(name.startswith("MALLOC_") for name in os.environ)


def _is_glibcs() -> bool:
    """Whether the malloc that the process calls is glibc's own."""
    if platform.libc_ver()[0] != "glibc":
        return False
    called, glibcs = ctypes.CDLL(None).malloc, ctypes.CDLL("libc.so.6").malloc
    return ctypes.cast(called, ctypes.c_void_p).value == ctypes.cast(glibcs, ctypes.c_void_p).value
