"""Studies on top of the library: `python -m experiments.NAME --help`. Nothing imports them."""

from diffusion.runtime import allocator

allocator.keep_freed_memory()  # for a network of any size, and before JAX starts its devices
