"""benchmarks.gpu: a rehearsal with real parts. If a part or the time ends, no other results are lost."""

import argparse
import importlib
import json
import shlex
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import agreement, candidates, gpu
from benchmarks.gpu import PARTS, Part
from diffusion.networks import layers

ALL = {part.name: part for part in PARTS}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """The processes of the parts compile as the tests do, for one device."""
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    monkeypatch.setenv("XLA_FLAGS", flags)


def settings(minutes: float = 25.0, **changes) -> argparse.Namespace:
    return argparse.Namespace(**{"minutes": minutes, "rehearse": True, "data_dir": None} | changes)


def statuses(states) -> dict[str, str]:
    return {name: state["status"] for name, state in states.items()}


def test_a_directory_without_the_data_is_an_error_before_any_part_is_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", f"--out={tmp_path / 'out'}", f"--data-dir={tmp_path}"])
    monkeypatch.setattr(gpu, "run_all", None)
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert "holds no prepared CIFAR-10" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_rehearsal_measures_and_is_not_repeated(tmp_path, monkeypatch):
    chosen = [ALL["sampling"], ALL["cudnn_attention"]]
    states = gpu.run_all(chosen, tmp_path, settings())
    assert statuses(states) == {"sampling": "done", "cudnn_attention": "skipped: it needs a GPU"}
    summary = (tmp_path / "gpu.md").read_text()
    ours = json.loads((tmp_path / "sampling.json").read_text())["rows"][0]
    assert f"| ours | {gpu.timing.cell(ours['seconds'])} |" in summary
    assert f"jax {jax.__version__}" in summary and "cpu ×1" in summary

    def refuse(*_):
        raise AssertionError("what is done was begun again")

    monkeypatch.setattr(gpu, "run", refuse)
    assert gpu.run_all(chosen, tmp_path, settings()) == states
    with pytest.raises(AssertionError, match="begun again"):  # another command is another measurement
        gpu.run_all([ALL["sampling"]], tmp_path, settings(rehearse=False))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_rehearsal_of_most_parts(tmp_path):
    """Bfloat16 keeps 8 binary digits, and a call of two steps does the same as two calls of one."""
    names = ("agreement", "likelihood", "one_pass_norm", "single_steps", "remat")
    states = gpu.run_all([ALL[name] for name in names], tmp_path, settings())
    assert statuses(states) == dict.fromkeys(names, "done")
    rows = json.loads((tmp_path / "agreement.json").read_text())["rows"]
    rms = {(row["compared"].split(",")[0], row["quantity"]): row["RMS difference / RMS"] for row in rows}
    assert 1e-4 < rms["bfloat16 against float32", "output"] < 0.05
    assert rms["a call of 2 steps against 2 calls of one", "change of the parameters after 2 steps"] < 1e-2
    assert rms["the calls of one again", "change of the parameters after 2 steps"] == 0
    assert rms["accelerator against CPU", "output"] == agreement.NOT_MEASURED


def test_differences_are_relative_to_the_second_result():
    wanted = {"a": np.array([3.0, -3.0]), "b": np.array([[3.0, 3.0]])}
    found = {"a": np.array([3.0, -3.0]), "b": np.array([[3.0, 3.6]])}
    row = agreement.row("found against wanted", "output", found, wanted)
    np.testing.assert_allclose((row["largest difference / RMS"], row["RMS difference / RMS"]), (0.2, 0.1))
    missing = agreement.row("found against wanted", "output", None, wanted)
    assert missing["largest difference / RMS"] == missing["RMS difference / RMS"] == agreement.NOT_MEASURED


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """A package `benchmarks` of stubs: `good` writes a result, `bad` fails, `slow` sleeps."""
    package = tmp_path / "repository" / "benchmarks"
    package.mkdir(parents=True)
    found = {name: "x" for name in gpu.FACTS} | {"versions": {"jax": "0"}, "rows": [{"arm": "ours", "seconds": 1.5}]}
    write = f"import sys; open(sys.argv[-1].removeprefix('--out='), 'w').write({json.dumps(found)!r})"
    (package / "good.py").write_text(write)
    (package / "bad.py").write_text("print('first'); raise MemoryError('no room')")
    (package / "slow.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(gpu, "REPOSITORY", package.parent)
    monkeypatch.setenv("PYTHONPATH", "")
    return {name: Part(name, 20, name, name) for name in ("good", "bad", "slow")}


def test_a_part_that_fails_or_hangs_does_not_stop_the_next(stubs, tmp_path):
    parts = [stubs["bad"], stubs["slow"]._replace(seconds=1), stubs["good"]]
    found = statuses(gpu.run_all(parts, tmp_path / "out", settings()))
    assert found == {
        "bad": "failed with exit code 1: MemoryError: no room",
        "slow": "out of time: stopped after 1 s",
        "good": "done",
    }
    summary = (tmp_path / "out" / "gpu.md").read_text()
    assert all(f"| {name} | {status} |" in summary for name, status in found.items())
    assert "| ours | 1.5 |" in summary


def test_no_part_is_begun_that_may_not_fit(stubs, tmp_path):
    parts = [stubs["good"]._replace(name="long", seconds=61), stubs["good"]]
    found = statuses(gpu.run_all(parts, tmp_path / "out", settings(minutes=1.0)))
    assert found["long"].startswith("not begun: it may take 61 s, and 60 s are left")
    assert found["good"] == "done"


def test_what_an_interruption_left_is_begun_again(stubs, tmp_path, monkeypatch):
    """A part that was cut short is not taken for done, even beside an older result."""
    out = tmp_path / "out"
    gpu.run_all([stubs["good"]], out, settings())
    interrupt = stubs["good"]._replace(rehearsal="good --changed")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gpu, "run", killed)
        gpu.run_all([interrupt], out, settings())
    assert "| good | begun, not finished |" in (out / "gpu.md").read_text()
    assert statuses(gpu.run_all([interrupt], out, settings())) == {"good": "done"}


def test_nothing_is_trained_without_data(tmp_path):
    states = gpu.run_all([ALL["training"]], tmp_path, settings(rehearse=False))
    assert statuses(states) == {"training": "skipped: no --data-dir"}


def test_every_command_is_one_that_its_benchmark_takes(monkeypatch, tmp_path):
    """Argparse refuses a misspelt flag or choice with exit code 2, before anything is computed."""

    class Parsed(Exception):
        pass

    parse_args = argparse.ArgumentParser.parse_args

    def parse(parser, *arguments):
        parse_args(parser, *arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    for part in PARTS:
        for rehearse in (False, True):
            command, _ = gpu.command_of(part, tmp_path, settings(rehearse=rehearse, data_dir=tmp_path))
            if command:
                module, *flags = shlex.split(command)
                monkeypatch.setattr(sys, "argv", [module, *flags, f"--out={tmp_path}/x.json"])
                with pytest.raises(Parsed):
                    importlib.import_module(f"benchmarks.{module}").main()


def test_a_norm_in_one_pass_is_the_norm():
    """Also where the mean is a thousand deviations, which E[h²] − E[h]² in float32 would not survive."""
    random = np.random.default_rng(0)
    h = (1000 + 3 * random.standard_normal((3, 1, 1, 8)) + random.standard_normal((3, 6, 6, 8))).astype(np.float32)
    centred, variance = candidates.centre_in_one_pass(jnp.asarray(h), 2)
    groups = h.astype(np.float64).reshape(3, 36, 2, 4)
    mean, wanted = groups.mean((1, 3), keepdims=True), np.repeat(groups.var((1, 3)), 4, axis=-1)
    np.testing.assert_allclose(centred, (groups - mean).reshape(h.shape), atol=3e-4)  # two steps of float32 at 1000
    np.testing.assert_allclose(variance[:, 0, 0], wanted, rtol=1e-4)

    def gradient(centre):
        def of(h):
            centred, variance = centre(h, 2)
            return jnp.sin(centred / jnp.sqrt(variance)).sum()

        return jax.grad(of)(jnp.asarray(h))

    found, wanted = gradient(candidates.centre_in_one_pass), gradient(layers.centre)
    np.testing.assert_allclose(found, wanted, atol=1e-3)  # of about 1; centred is off by up to 3e-4, as above


def test_attention_is_what_jax_calls_attention():
    """Its layout and its scale, which cuDNN's kernel shares; two heads, and more keys than queries."""
    shapes = ((2, 5, 2, 8), (2, 7, 2, 8), (2, 7, 2, 8))
    inputs = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
    wanted = jax.nn.dot_product_attention(*inputs, implementation="xla")
    np.testing.assert_allclose(layers.attend(*inputs), wanted, atol=1e-6)  # float32 in another order
