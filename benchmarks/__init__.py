"""Speed, memory and scaling, measured: python -m benchmarks.NAME --help. Nothing imports this."""

from diffusion.runtime import allocator

allocator.keep_freed_memory()  # for a network of any size, and before JAX starts its devices
