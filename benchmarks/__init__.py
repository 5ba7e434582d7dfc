"""Speed, memory and scaling, measured: python -m benchmarks.NAME --help. Nothing imports this."""

from diffusion.runtime import allocator

allocator.keep_freed_memory()  # as in main.py, and before any of the modules here imports JAX
