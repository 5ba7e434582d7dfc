"""The first line says where a program runs, and an unused GPU is reported."""

import importlib.util
from types import SimpleNamespace

import jax
import pytest

from diffusion.reporting import opening

VERSION = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.104.05  Release Build  (root@host)\n"


@pytest.fixture
def with_gpu(tmp_path, monkeypatch):
    """A file system with an NVIDIA GPU, where nobody told JAX what to take."""
    for path, text in (("dev/nvidia0", ""), ("dev/nvidiactl", ""), ("proc/driver/nvidia/version", VERSION)):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    nobody = SimpleNamespace(config=SimpleNamespace(jax_platforms=None), default_backend=lambda: "cpu")
    monkeypatch.setattr(opening, "jax", nobody)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def test_the_first_line_says_devices_processes_versions_and_where_results_go(monkeypatch):
    line = opening.line("train", "runs/a")
    assert line.startswith("train on cpu ×8 (") and line.endswith("; results: runs/a")
    assert f", jax {jax.__version__}, Python 3." in line and "diffusion 0." in line
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert opening.line("describe", "").startswith("describe on cpu ×8 in 2 processes (")
    assert "results" not in opening.line("describe", "")


@pytest.mark.parametrize("plugin", [None, "jax_cuda12_plugin"])
def test_a_gpu_that_is_left_unused_is_told_with_the_driver_and_the_cure(with_gpu, monkeypatch, plugin):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == plugin or None)
    hint = opening.missed_gpu(with_gpu)
    assert hint.startswith("this runs on the CPU although an NVIDIA GPU is here (driver 535.104.05): ")
    assert ("pip install -c constraints.txt -e '.[cuda]'" in hint) == (plugin is None)
    assert ("plugin cannot use it" in hint) == (plugin is not None)
    assert "needs driver 580 or newer; with driver 525 or newer, pip install 'jax[cuda12]'" in hint
    (with_gpu / "proc/driver/nvidia/version").unlink()
    assert "(driver unknown)" in opening.missed_gpu(with_gpu)


def test_nothing_is_said_without_a_gpu_and_where_the_cpu_was_chosen(with_gpu, monkeypatch):
    assert opening.missed_gpu(with_gpu)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not opening.missed_gpu(with_gpu)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with monkeypatch.context() as patch:
        patch.setattr(opening.jax, "default_backend", lambda: "gpu")
        assert not opening.missed_gpu(with_gpu)
    with monkeypatch.context() as patch:
        patch.setattr(opening.jax.config, "jax_platforms", "cpu")
        assert not opening.missed_gpu(with_gpu)
    (with_gpu / "dev/nvidia0").unlink()
    assert not opening.missed_gpu(with_gpu)
