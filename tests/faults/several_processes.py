"""The same run on 1 process × 4 devices, on 2 × 2, and moved from 4 devices to 2 and to 1: how far the ends are apart.

    python tests/faults/several_processes.py [--workdir=DIR]

Prints a line per comparison: the largest difference of a parameter, relative to the largest parameter, which is what
another order of sums may cost. Takes about five minutes on 2 CPU cores.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

TINY = {
    "schedule.num_steps": 6, "unet.channels": 8, "unet.multipliers": "(1,)", "unet.attention_resolutions": "()",
    "unet.groups": 4, "unet.fourier_features": "()", "train.batch_size": 16, "train.num_steps": 12,
    "train.log_every": 3, "train.checkpoint_every": 4, "train.sample_every": 0, "train.keep_checkpoints": 20,
    "train.check_replicas_every": 4, "eval.num_images": 16, "sample.num_images": 4, "optim.warmup_steps": 2,
}  # fmt: skip
TOLERANCE = 1e-4


def start(workdir: Path, devices: int, *flags: str, **overrides) -> subprocess.Popen:
    """main.py on `devices` CPU devices; its output is in workdir/../NAME.log."""
    keys = [f"--config.{key}={value}" for key, value in (TINY | overrides).items()]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
    }
    with workdir.with_suffix(f".{len(flags)}{flags[-1][-1:] if flags else ''}.log").open("w") as log:
        command = [sys.executable, "main.py", "--config=configs/digits.py", f"--workdir={workdir}", *keys, *flags]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def start_two(workdir: Path, devices: int, **overrides) -> list[subprocess.Popen]:
    """Two processes of one run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = (f"--coordinator=localhost:{port}", "--num_processes=2")
    return [start(workdir, devices, *flags, f"--process_id={i}", **overrides) for i in range(2)]


def wait(processes: list[subprocess.Popen], code: int = 0) -> None:
    codes = [process.wait(600) for process in processes]
    assert codes == [code] * len(codes), f"exit codes {codes}, expected {code}"


def leaves(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """The saved state's arrays by their paths."""
    import orbax.checkpoint as ocp
    from flax.traverse_util import flatten_dict

    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore((workdir / "checkpoints" / str(step) / "state").absolute())
    return {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(tree).items()}


def apart(one: Path, other: Path, step: int = 12) -> float:
    """The largest difference of a parameter, relative to the largest parameter."""
    a, b = leaves(one, step), leaves(other, step)
    assert a.keys() == b.keys()
    names = [name for name in a if name.startswith(("params/", "ema_params/"))]
    return max(np.abs(a[name] - b[name]).max() for name in names) / max(np.abs(a[name]).max() for name in names)


def until(condition, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def compare_processes(root: Path) -> None:
    """2 × 2 devices against 1 × 4, then once more with a SIGTERM to the second process alone."""
    wait([start(root / "one", 4)])
    wait(start_two(root / "two", 2))
    difference = apart(root / "one", root / "two")
    print(f"2 processes × 2 devices against 1 × 4, 12 steps: {difference:.1e}", flush=True)
    assert difference < TOLERANCE
    written = {path.name for path in (root / "two").iterdir()}
    assert written == {path.name for path in (root / "one").iterdir()}, "only the first process writes"

    pair = start_two(root / "stopped", 2, **{"train.num_steps": 400})
    until(lambda: (root / "stopped" / "checkpoints" / "4").exists())
    pair[1].send_signal(signal.SIGTERM)
    wait(pair, code=75)
    saved = max(int(path.name) for path in (root / "stopped" / "checkpoints").glob("[0-9]*"))
    print(f"SIGTERM to one of two processes: both ended with exit code 75 after saving step {saved}", flush=True)


def compare_topologies(root: Path) -> None:
    """A run stopped on 4 devices goes on on 2 and then on 1, and the reverse; root/one ran on 4 throughout."""
    for name, devices in (("down", (4, 2, 1)), ("up", (1, 2, 4))):
        for part, number in enumerate(devices):
            running = start(root / name, number)
            if part < 2:
                target = 4 * (part + 1)
                until(lambda at=target, n=name: (root / n / "checkpoints" / str(at)).exists())
                running.send_signal(signal.SIGTERM)
                assert running.wait(600) in (0, 75)
        difference = apart(root / "one", root / name)
        print(f"{' → '.join(map(str, devices))} devices against 4, 12 steps: {difference:.1e}", flush=True)
        assert difference < TOLERANCE


def main(root: Path) -> None:
    compare_processes(root)
    compare_topologies(root)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, help="kept; by default a temporary folder")
    given = parser.parse_args().workdir
    with tempfile.TemporaryDirectory() as temporary:
        folder = given or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        main(folder)
