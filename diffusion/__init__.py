"""Denoising diffusion in JAX and Flax, one importable module per idea: `from diffusion import schedules`."""

__version__ = "0.3.0"
