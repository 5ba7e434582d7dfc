"""A sweep of two variances and two seeds, and where sweeps are started."""

from pathlib import Path

import jax
import numpy as np
import pytest
from sweep_runs import AXES, BASE, write_run

from experiments import sweep


@pytest.fixture
def finished(tmp_path):
    """Two variances × two seeds with bounds that share what makes an image hard; returns bounds [seed, image]."""
    generator = np.random.default_rng(0)
    hardness = generator.normal(3.0, 0.5, 40)
    bounds = {
        name: np.stack([hardness + shift + generator.normal(0, 0.02, 40) + 0.01 * seed for seed in (0, 1)])
        for name, shift in (("fixed_small", 0.0), ("fixed_large", 0.2))
    }
    for cell in sweep.grid(BASE, AXES, {}):
        image_bpd = bounds[cell.overrides["model.variance"]][int(cell.overrides["seed"])]
        write_run(tmp_path, cell.name, image_bpd, cell.config())
    return bounds


@pytest.fixture
def from_the_root(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    jax.devices()  # JAX reads the flags at its first use, and these are not for the tests' own process
    # The runs have one device, and compile as the tests do: without optimization.
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    monkeypatch.setenv("XLA_FLAGS", flags)
