"""Keeps freed memory in the process, so that XLA's CPU temporaries are not fetched from the system at every call."""

import ctypes
import os
import platform

SWITCH = "DIFFUSION_KEEP_FREED_MEMORY"  # 0 leaves the allocator as it is
# Bytes of the first map of a batch, from which on `main.py` keeps freed memory: docs/reliability.md has the times.
LARGE_MAP = 512 * 1024
# glibc's malloc.h; see mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to keep freed memory. Call it before JAX starts its devices.

    On a CPU XLA allocates the temporaries of a compiled program at every call and frees them at its end. By default
    glibc returns large ones to the system, which must then clear and map every page anew. With this setting large
    allocations also come from the heap, and the heap never shrinks. All threads that start later share one heap, since
    the heaps of further threads are too small for large allocations. In return the process keeps its peak size.

    On an accelerator the temporaries are in the device's memory, and CUDA allocates pinned host memory itself. malloc
    then serves only batches and results, so little is gained or lost.

    Returns:
        Whether malloc was told. It is left alone if DIFFUSION_KEEP_FREED_MEMORY is 0, if the user has set it by
        GLIBC_TUNABLES or MALLOC_..., if another library has replaced it (jemalloc or tcmalloc by LD_PRELOAD), and if
        the C library is not glibc.
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
