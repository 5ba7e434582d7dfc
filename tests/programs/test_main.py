"""The command line as a user sees it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest

from configs import cifar10, digits_fixed
from diffusion.experiment import build, workdir
from diffusion.programs import describe

ROOT = Path(__file__).resolve().parents[2]
DIGITS = f"--config={ROOT / 'configs' / 'digits.py'}"


def main(*arguments, cwd=ROOT, env=None):
    command = [sys.executable, str(ROOT / "main.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def test_help_is_quick_and_names_the_flags():
    started = time.monotonic()
    result = main("--help")
    # Measured 0.3 s; 3 s is the promise, and the rest is for a busy machine.
    assert time.monotonic() - started < 6
    assert all(flag in result.stdout for flag in ("--config", "--workdir", "--mode"))


def test_help_comes_before_a_config_which_takes_seconds_to_read(tmp_path):
    (tmp_path / "config.py").write_text(f"open({str(tmp_path / 'was_read')!r}, 'w')\ndef get_config(): pass\n")
    result = main(f"--config={tmp_path / 'config.py'}", "--help")
    assert "--workdir" in result.stdout and not (tmp_path / "was_read").exists()


MISTAKES = [
    ((), "no --config is given"),
    (("--workdir=none", "--config.seed=3"), "no --config is given, and --workdir=none holds no run"),
    (("--fork=none@5", "--workdir=new", "--config.seed=3"), "no --config is given, and --fork=none@5 holds no run"),
    (("--config.init_from=none", "--workdir=new"), "no --config is given, and --config.init_from=none holds no run"),
    (("--config=configs/none.py",), "error: --config=configs/none.py is no file"),
    (("--config=configs/digit.py", "--config.seed=3"), "configs/digits.py?"),
    ((DIGITS, "--train.num_steps=3"), "config key train.num_steps is set by --config.train.num_steps=VALUE"),
    ((DIGITS, "--config.init_adapt=True"), "init_adapt=True has no effect without init_from"),
    ((DIGITS, "--fork=a", "--workdir=new", "--config.init_from=b"), "give one of the two"),
    ((DIGITS, "--mode=trian"), "trian"),
    ((DIGITS, "--config.unet.chanels=3"), "did you mean unet.channels?"),
    ((DIGITS, "--config.unet.channels=many"), "unet.channels"),
    ((DIGITS, "--config.optim.name=adam(beta=1)"), "adam has no argument beta"),
    ((DIGITS, "--config.data.name=nowhere"), "data.name='nowhere'"),
    ((DIGITS, "extra"), "unexpected argument 'extra'"),
    ((DIGITS, "--mode=sample", "--workdir=nothing"), "no checkpoint"),
    ((DIGITS, "--mode=describe", "--output=a"), "--output=a has no effect in --mode=describe"),
    ((DIGITS, "--mode=eval", "--allow_other_data"), "--allow_other_data has no effect in"),
    ((DIGITS, "--mode=compress", "--input=test"), "--mode=compress needs --output"),
    ((DIGITS, "--mode=export"), "--mode=export needs --output"),
    ((DIGITS, "--workdir=gs://a/b"), "error: --workdir=gs://a/b is not a local directory; remote paths are not read"),
    ((DIGITS, "--config.data.data_dir=gs://a/b"), "error: data.data_dir=gs://a/b is not a local directory; remote"),
]
LAYER = f"--config={ROOT / 'tests' / 'faults' / 'digits_layer.py'}"
DESCRIBE = (LAYER, "--mode=describe", "--workdir=described", "--config.eval.num_images=9", "--config.unet.channels=64")


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """How main.py ended with each of the mistakes and with DESCRIBE; and what they wrote."""
    empty = tmp_path_factory.mktemp("empty")
    arguments = [*(mistake for mistake, _ in MISTAKES), DESCRIBE]
    found = forked.starts([list(given) for given in arguments], empty)
    return dict(zip(arguments, found, strict=True)), list(empty.iterdir())


@pytest.mark.parametrize(("arguments", "words"), MISTAKES)
def test_a_mistake_is_a_one_line_error_and_exit_code_2(arguments, words, ends):
    code, output = ends[0][arguments]
    assert code == 2, output
    assert words in output and "Traceback" not in output
    assert output.strip().splitlines()[-1].startswith("error: ")


def test_describe_prints_its_figures(ends):
    code, output = ends[0][DESCRIBE]
    assert code == 0, output
    assert "warning: unet.channels: no effect with model.network='layer'" in output
    assert "1,498 training and 299 test images" in output and "GFLOP per image" in output
    keys = {line.split()[0]: line for line in output.splitlines() if line}
    assert keys["eval.num_images"].split()[1:5] == ["9", "0", "yes", "of"]  # value, default, may change, help
    assert keys["train.num_steps"].split()[1:5] == ["2400", "800000", "only", "up"]


def test_the_directory_of_a_run_is_enough_and_keys_change_its_config(tmp_path, tiny_data_dir):
    config = digits_fixed.get_config()
    config.optim.learning_rate, config.data.data_dir = 0.123, tiny_data_dir
    workdir.claim(config, tmp_path)
    here = f"--workdir={tmp_path}"
    given = [
        [here, "--mode=describe", "--config.eval.num_images=9"],
        ["--mode=sample", "--workdir", str(tmp_path), "--config.optim.learning_rate=0.5"],
        [here, "--config.eval.num_image=9"],
        [f"--workdir={tmp_path / 'none'}", "--mode=describe"],
    ]
    start = f"--config.init_from={tmp_path}"
    given += [[start, "--mode=describe"], [start, "--mode=describe", "--workdir=new", "--config.eval.num_images=9"]]
    *ends, of_start = forked.starts(given, tmp_path)
    described, *refused = ends
    for code, output in (described, of_start):
        assert code == 0, output
        printed = json.loads(output[output.index("{") : output.index("\n}\n") + 2])
        assert printed["optim"]["learning_rate"] == 0.123 and printed["eval"]["num_images"] == 9
    words = ["optim.learning_rate: 0.123 → 0.5"]
    words += ["did you mean eval.num_images?", "no --config is given", "needs --workdir"]
    for (code, output), expected in zip(refused, words, strict=True):
        assert code == 2 and expected in output.strip().splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_nothing_is_written_by_a_mistake_or_a_description(ends):
    assert ends[1] == []


def test_an_error_of_a_library_keeps_its_traceback(tmp_path):
    """A one-line error is for what the user can mend; a bug must show where it is."""
    config = tmp_path / "broken.py"
    config.write_text(
        "from configs import digits_fixed\nimport numpy as np\nimport diffusion.data\n"
        "def get_config():\n    diffusion.data.describe = lambda *a: np.zeros(3).reshape(2)\n"
        "    return digits_fixed.get_config()\n"
    )
    result = main(f"--config={config}", f"--workdir={tmp_path / 'run'}")
    assert result.returncode == 1 and "Traceback" in result.stderr and "cannot reshape" in result.stderr


INTERRUPTED = """
import os, signal, threading, time
import jax, jax.numpy as jnp
import diffusion.programs.train
from configs import digits_fixed
from diffusion.runtime.preemption import Preemption

def many(x):
    for i in range(300):
        x = jnp.sin(x @ x) + i
    return x.sum()

def run(config, directory, base, allow_other_data, forked):
    x = jnp.ones((600, 600))
    with Preemption():
        threading.Thread(target=lambda: jax.jit(jax.grad(many)).lower(x).compile(), daemon=True).start()
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

def get_config():
    diffusion.programs.train.run = run
    return digits_fixed.get_config()
"""


def test_a_signal_while_xla_compiles_ends_with_the_code_to_requeue_on(tmp_path):
    """Taking Python down around XLA's threads would end with a segmentation fault."""
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    # Without the tests' XLA flags, with which the compilation is soon over.
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    result = main(f"--config={tmp_path / 'interrupted.py'}", f"--workdir={tmp_path / 'run'}", env=env)
    assert result.returncode == 75, result.stderr
    assert "stopped by SIGTERM; the same command goes on" in result.stderr


def test_describe_knows_ho_et_al():
    """Parameters and work are those of test_configs.py and benchmarks' test of the same network."""
    experiment = build.experiment(cifar10.get_config(), (32, 32, 3), 256)
    assert describe.schedule_figures(experiment)["  KL penalty of fixed_large"].startswith("0.48642 bits/dim")
