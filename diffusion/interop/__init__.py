"""Published weights in and out, one module per program that published them."""

from diffusion.interop.diffusers import load_diffusers, save_diffusers

__all__ = ["load_diffusers", "save_diffusers"]
