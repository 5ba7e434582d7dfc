"""Published weights in and out, one module per program that publishes them; `files` finds and reads the tensors."""

from diffusion.interop.diffusers import load_diffusers, save_diffusers

__all__ = ["load_diffusers", "save_diffusers"]
