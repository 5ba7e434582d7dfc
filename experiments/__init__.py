"""Studies on top of the library: `python -m experiments.NAME --help`; nothing imports them."""

from diffusion.runtime import allocator

allocator.keep_freed_memory()  # as in main.py, and before any of the modules here imports JAX
