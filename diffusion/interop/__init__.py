"""Reads and writes published weights, with a module for each codebase that publishes them."""

from diffusion.interop.diffusers import load_diffusers, save_diffusers
from diffusion.interop.ho2020 import load_ho2020
from diffusion.interop.openai import load_adm, load_openai, save_openai
from diffusion.interop.pipelines import load_pipeline
from diffusion.interop.vdm import load_vdm

__all__ = [
    "load_adm",
    "load_diffusers",
    "load_ho2020",
    "load_openai",
    "load_pipeline",
    "load_vdm",
    "save_diffusers",
    "save_openai",
]
