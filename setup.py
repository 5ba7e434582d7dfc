"""Packaging: what the project needs to run, and the extras for accelerators and for developers.

The exact versions that continuous integration proves are in constraints.txt:
`pip install -c constraints.txt -e .[dev]`.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search(r'^__version__ = "(.+)"$', Path("diffusion/__init__.py").read_text(), re.MULTILINE)[1]

# 0.10.2 returns wrong sums on CPUs (jax issue 39103), 0.11.0 and 0.11.1 wrong values on some GPUs (issue 40633).
SOUND = ">=0.10,!=0.10.2,!=0.11.0,!=0.11.1"

setup(
    name="diffusion",
    version=VERSION,
    description="Denoising diffusion in JAX and Flax: training, sampling and bits per dimension",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["diffusion", "diffusion.*"]),
    package_data={"diffusion": ["weights/*/*"], "diffusion.reporting.page": ["templates/*"]},
    install_requires=[
        "absl-py",
        "array-record",
        "constriction>=0.5,<0.6",  # the coder of --mode=compress; another one would read old files differently
        "flax>=0.12",
        "importlib_resources",  # tensorflow-datasets imports it without declaring it
        f"jax{SOUND}",
        f"jaxlib{SOUND}",
        "jaxtyping",
        "jinja2",
        "matplotlib",
        "ml-collections",
        "numpy>=2",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8,<0.13",  # runtime/checkpoint.py was tested with its layout and API; 1.0 has another
        "pillow",
        "safetensors",
        "scikit-learn",
        "scipy",
        "tensorboardX",
        "tensorflow-datasets>=4.9.8",
        "tqdm",
    ],
    extras_require={
        "cuda": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "compilers": ["jax[cuda12,tpu]"],  # benchmarks/compiled.py compiles for devices that are not there
        "inception": ["torch"],  # reads the published weights once
        "openai": ["torch"],  # reads and writes checkpoints of improved-diffusion and guided-diffusion
        "peers": ["diffusers", "torch", "torch-fidelity", "torchvision"],  # to compare with; no program needs them
        "wandb": ["wandb>=0.31"],  # a logger; tried with 0.31.0
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.7,<10", "mkdocstrings-python>=2", "ruff"],  # make docs
        "ode": ["diffrax>=0.7"],  # diffusion/exact/ode.py alone needs it
        "dev": [
            "beartype",
            "diffrax>=0.7",
            "hypothesis",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
        ],
    },
)
