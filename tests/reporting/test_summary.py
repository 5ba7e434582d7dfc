"""Summaries: finite numbers, complete files, and what the numbers depend on."""

import json
import platform

import jax
import numpy as np
import pytest

import diffusion
from diffusion.reporting import summary


def test_the_file_is_complete_or_the_old_one(tmp_path):
    numbers = {"step": 1, "test_bpd": np.float32(0.5), "test_bpd_stderr": None, "versions": summary.versions()}
    summary.write_json(tmp_path / "summary.json", numbers)
    first = json.loads((tmp_path / "summary.json").read_text())
    assert first["test_bpd"] == 0.5 and first["versions"]["jax"] == jax.__version__
    with pytest.raises(TypeError):
        summary.write_json(tmp_path / "summary.json", {"step": 2, "test_bpd": object()})
    assert json.loads((tmp_path / "summary.json").read_text()) == first
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_the_device_is_named_with_how_many():
    assert summary.device_name() == f"cpu ×{jax.device_count()}"


@pytest.mark.parametrize("value", [np.float32(np.inf), -float("inf"), float("nan"), np.float64(np.nan)])
def test_a_nan_or_inf_is_refused_by_name(tmp_path, value):
    with pytest.raises(ValueError, match=f"test_bpd is {float(value)}"):
        summary.write_json(tmp_path / "summary.json", {"step": 1, "test_bpd": value})
    assert not (tmp_path / "summary.json").exists()


def test_versions_are_those_that_run():
    versions = summary.versions()
    assert versions["python"] == platform.python_version() and versions["diffusion"] == diffusion.__version__
    assert (versions["jax"], versions["numpy"]) == (jax.__version__, np.__version__)
    assert {"jaxlib", "flax", "optax", "orbax-checkpoint"} < versions.keys()
