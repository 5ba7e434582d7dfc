"""Summaries: finite numbers, complete files, and the versions behind the numbers."""

import json
import platform

import jax
import jax.numpy as jnp
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


def test_a_nan_deep_inside_is_refused_by_its_path(tmp_path):
    row = {"test_bpd": np.float32(2.0), "terms": (1.0, jnp.inf)}
    with pytest.raises(ValueError, match=r"^runs\[1\]\.terms\[1\] is inf, not a finite number$"):
        summary.write_json(tmp_path / "all.json", {"runs": [{"test_bpd": 1.0}, row]})
    with pytest.raises(ValueError, match=r"^kl\[1\] is nan"):
        summary.write_json(tmp_path / "all.json", {"kl": np.array([0.0, np.nan])})
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_numpy_and_jax_are_plain_however_deep(tmp_path):
    deep = {"of": {"x": np.float64(0.1), "n": np.int32(3)}, "a": np.arange(2), "j": [jnp.float32(0.5), None, True]}
    summary.write_json(tmp_path / "all.json", deep)
    expected = {"of": {"x": 0.1, "n": 3}, "a": [0, 1], "j": [0.5, None, True]}
    assert json.loads((tmp_path / "all.json").read_text()) == expected


def test_seconds_are_those_of_all_legs_also_of_one_that_was_killed(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(summary.time, "monotonic", lambda: now[0])
    path = tmp_path / "seconds.json"
    with pytest.raises(KeyboardInterrupt), summary.Stopwatch(path) as leg:
        now[0] += 4
        leg.tick()
        assert not path.exists()  # too soon to write again
        raise KeyboardInterrupt
    now[0] += 1000  # between the legs
    killed = summary.Stopwatch(path)
    now[0] += 20
    killed.tick()
    now[0] += 3  # is lost
    with summary.Stopwatch(path) as leg:
        now[0] += 2.5
        assert leg.seconds() == 4 + 20 + 2.5
    assert json.loads(path.read_text()) == {"seconds": 26.5}


@pytest.mark.parametrize("text", ["", "[]", "{}", "3"])
def test_a_damaged_count_of_seconds_is_named(tmp_path, text):
    (tmp_path / "seconds.json").write_text(text)
    with pytest.raises(ValueError, match="seconds.json is damaged; delete it"):
        summary.Stopwatch(tmp_path / "seconds.json")


def test_versions_are_those_that_run():
    versions = summary.versions()
    assert versions["python"] == platform.python_version() and versions["diffusion"] == diffusion.__version__
    assert (versions["jax"], versions["numpy"]) == (jax.__version__, np.__version__)
    assert {"jaxlib", "flax", "optax", "orbax-checkpoint"} < versions.keys()
