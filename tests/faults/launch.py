"""Starts runs as a user would, in separate processes that can be stopped and killed, and compares their ends."""

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# A run of main.py on the digits that takes seconds, once it is compiled.
TINY = {
    "schedule.num_steps": 6, "unet.channels": 8, "unet.channel_mult": "(1,)", "unet.attention_resolutions": "()",
    "unet.num_groups": 4, "unet.fourier_features": "()", "train.sample_every": 0, "train.keep_checkpoints": 99,
    "eval.num_images": 16, "sample.num_images": 4, "optim.warmup_steps": 2, "train.batch_size": 16,
    "train.check_replicas_every": 4, "train.num_steps": 60, "train.log_every": 3, "train.checkpoint_every": 4,
}  # fmt: skip
# Equal programs compile once. A process that is killed may leave a broken file there, which JAX compiles again.
COMPILED = Path(os.environ.get("DIFFUSION_TESTS_COMPILED", tempfile.gettempdir())) / "diffusion-faults"


def environment(devices: int) -> dict[str, str]:
    """Variables of a process that has so many CPU devices and is soon compiled.

    The flags follow those of the tests: of equal ones the last counts.
    """
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(COMPILED),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
    }


class Run(subprocess.Popen):
    """A process whose output is appended to a file.

    The output takes a pipe and `cat`: a limit on the size of this process's files must not cut its log as well.
    """

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]):
        with log.open("a") as file:
            self._copier = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file)
        with self._copier.stdin as pipe:
            super().__init__(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once all output is in the file."""
        code = super().wait(timeout)
        self._copier.wait(timeout)
        return code


def start(
    workdir: Path,
    devices: int = 1,
    flags: tuple = (),
    toy: bool = False,
    config: str = "configs/digits.py",
    variables: dict[str, str] | None = None,
    **overrides,
) -> Run:
    """main.py on `devices` CPU devices, or toy.py; the output is appended to `log(workdir)`."""
    program = ["tests/faults/toy.py", str(workdir)] if toy else ["main.py", f"--config={config}"]
    if toy:
        keys = [f"--{key}={value}" for key, value in overrides.items()]
    else:
        keys = [f"--workdir={workdir}", *(f"--config.{key}={value}" for key, value in (TINY | overrides).items())]
    command = [sys.executable, *program, *keys, *flags]
    workdir.parent.mkdir(parents=True, exist_ok=True)
    return Run(command, log(workdir), environment(devices) | (variables or {}))


def log(workdir: Path) -> Path:
    """The file with the output of the runs in `workdir`."""
    return workdir.with_suffix(".log")


def start_two(workdir: Path, devices: int, **options) -> list[Run]:
    """Two processes of one run, each with `devices` devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = (f"--coordinator=localhost:{port}", "--num_processes=2")
    return [start(workdir, devices, (*flags, f"--process_id={i}"), **options) for i in range(2)]


def wait(*running: Run, code: int = 0, seconds: float = 900) -> None:
    """Until all have ended, with this exit code."""
    codes = [process.wait(seconds) for process in running]
    if codes != [code] * len(codes):
        raise AssertionError(f"{running[0].args}: exit codes {codes}, not {code}")


def limit_files(running: Run, num_bytes: int) -> None:
    """From now on the process cannot write beyond this size of a file, as if the disk were full."""
    resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def half_a_checkpoint(workdir: Path) -> int:
    """Half the size in bytes of the largest file of a checkpoint."""
    return max(path.stat().st_size for path in (workdir / "checkpoints").rglob("*") if path.is_file()) // 2


def until_saved(workdir: Path, step: int, seconds: float = 900) -> None:
    """Until a checkpoint of `step` or a later one is there."""
    deadline = time.monotonic() + seconds
    while (
        max((int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdecimal()), default=0)
        < step
    ):
        if time.monotonic() > deadline:
            raise AssertionError(f"no checkpoint of step {step} in {workdir}")
        time.sleep(0.02)


def cut(source: Path, target: Path, step: int) -> None:
    """A run that was stopped after `step`: what later steps left is not copied."""
    target.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(source / name, target / name)
    if (source / "base.json").exists():  # the toy is made by no config file
        shutil.copy(source / "base.json", target / "base.json")
    shutil.copytree(source / "checkpoints" / str(step), target / "checkpoints" / str(step))


def end(workdir: Path) -> dict:
    """What must be equal, bit by bit, however often a run was stopped: the last state and the metrics."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = workdir / "checkpoints" / str(rows[-1]["step"])
    found = {"rows": [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]}
    found["state"] = json.loads((last / "digests" / "metadata").read_text())
    if (workdir / "summary.json").exists():
        found["summary"] = json.loads((workdir / "summary.json").read_text())
        del found["summary"]["seconds"]
    return found
