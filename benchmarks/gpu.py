"""All GPU benchmarks for the empty tables, in order of value, on one GPU and within 25 minutes.

    python -m benchmarks.gpu --data-dir=DIR                  # DIR holds CIFAR-10; without it nothing is trained
    python -m benchmarks.gpu --only agreement train_step     # some of the parts
    python -m benchmarks.gpu --rehearse                      # at a small size, on a CPU

Every part is a benchmark in its own process, so that a crash or a missing package ends only that part. Each part writes
NAME.json and NAME.log into --out, and gpu.md summarizes the results so far. The same command again skips finished parts
and runs the others. Nothing is downloaded.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import timing
from diffusion.data import tfds
from diffusion.reporting import summary
from diffusion.runtime import files
from experiments import commands

REPOSITORY = Path(__file__).resolve().parents[1]
# JAX takes its share of the card's memory at once; the rest is for PyTorch.
MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45"}
# The entries that `timing.finish` writes for every benchmark, besides ratios and other figures.
FACTS = ("date", "device", "cpu_cores", "load_average", "versions", "settings", "rows")
SECONDS_TO_STOP = 30  # a training saves its state when it is asked to stop

States = dict[str, dict[str, Any]]


class Part(NamedTuple):
    """A benchmark to run.

    Attributes:
        name: the name of its files.
        seconds: its time limit; it does not start with less time left.
        command: the arguments of `python -m benchmarks.`, without --out.
        rehearsal: the same at a small size on a CPU; None if it needs a GPU.
        trains: whether it takes --workdir, and --data-dir unless it is a rehearsal.
    """

    name: str
    seconds: int
    command: str
    rehearsal: str | None
    trains: bool = False


def candidate(name: str, seconds: int = 150) -> Part:
    """The train step beside one of candidates.py."""
    arms = f"train_step --no-peer --arms plain {name}"
    small = None if name == "cudnn_attention" else f"{arms} --size=tiny --batch-size=2 --rounds=2 --steps-per-call=2"
    return Part(name, seconds, f"{arms} --dtypes bfloat16 --batch-size=128 --steps-per-call=10", small)


PARTS = (
    Part("agreement", 300, "agreement", "agreement --size=tiny --batch-size=2 --steps=2"),
    Part(
        "train_step",
        420,
        "train_step --dtypes bfloat16 --batch-size=128 --arms plain",
        "train_step --size=tiny --batch-size=2 --rounds=2 --arms plain",
    ),
    Part(
        "sampling",
        240,
        "sampling --dtype=bfloat16",
        "sampling --size=tiny --num-images=2 --num-steps=3 --rounds=2",
    ),
    Part(
        "likelihood",
        180,
        "likelihood --dtype=bfloat16",
        "likelihood --size=tiny --batch-sizes 2 --batches=2 --rounds=2",
    ),
    Part("inception", 150, "inception --num-images=1024", "inception --num-images=1 --rounds=1 --no-compile"),
    Part(
        "training",
        300,
        "training --dtype=bfloat16",
        "training --config=digits_fixed --num-steps=20",
        trains=True,
    ),
    *(candidate(name) for name in ("one_pass_norm", "cudnn_attention", "single_steps", "remat")),
)


def main() -> None:
    parser = commands.argument_parser(__doc__)
    names = [part.name for part in PARTS]
    parser.add_argument("--out", type=Path, help="directory for all results; default: runs/gpu")
    parser.add_argument("--minutes", type=float, default=25, help="time limit: parts that may exceed it do not start")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--data-dir", type=Path, help="directory of CIFAR-10: see configs/cifar10.py")
    parser.add_argument("--rehearse", action="store_true", help="at a small size, on a CPU")
    args = parser.parse_args()
    if args.data_dir and tfds.find("cifar10", args.data_dir) is None:
        parser.error(f"--data-dir={args.data_dir} holds no prepared CIFAR-10 (cifar10/VERSION/dataset_info.json)")
    out = args.out or Path("runs/gpu_rehearsal" if args.rehearse else "runs/gpu")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the part is stopped, too
    states = run_all([part for part in PARTS if part.name in args.only], out, args)
    print(f"\n{out / 'gpu.md'}")
    sys.exit(any(state["status"].startswith(("failed", "out of time")) for state in states.values()))


def run_all(parts: Sequence[Part], out: Path, args: argparse.Namespace) -> States:
    """Runs the unfinished parts in order; returns what gpu.json has: each part's status, command and seconds."""
    end, out = time.monotonic() + 60 * args.minutes, out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    states: States = {part.name: {"status": "not begun", "command": "", "seconds": 0.0} for part in parts}
    if (out / "gpu.json").exists():
        states |= json.loads((out / "gpu.json").read_text())

    def note(part: Part, status: str, command: str, seconds: float = 0.0) -> None:
        states[part.name] = {"status": status, "command": command, "seconds": round(seconds, 1)}
        summary.write_json(out / "gpu.json", states)
        files.write_text(out / "gpu.md", report(states, out))
        print(f"{part.name}: {status}", flush=True)

    for part in parts:
        command, obstacle = command_of(part, out, args)
        before, left = states[part.name], end - time.monotonic()
        if before["status"] == "done" and before["command"] == command and result(out, part.name):
            continue
        if obstacle:
            note(part, f"skipped: {obstacle}", command)
        elif left < part.seconds:
            note(part, f"not begun: it may take {part.seconds} s, and {max(0, left):.0f} s are left", command)
        else:
            note(part, "begun, not finished", command)
            begun = time.monotonic()
            status = run(part, command, out)
            note(part, status, command, time.monotonic() - begun)
    return states


def command_of(part: Part, out: Path, args: argparse.Namespace) -> tuple[str, str]:
    """The part's command without --out, and the obstacle to running it, or ""."""
    if args.rehearse and part.rehearsal is None:
        return "", "it needs a GPU"
    command, obstacle = part.rehearsal if args.rehearse else part.command, ""
    if part.trains:
        command += f" --workdir={shlex.quote(str(out / part.name))}"
    if part.trains and not args.rehearse:
        obstacle = "" if args.data_dir else "no --data-dir"
        command += f" --data-dir={shlex.quote(str(args.data_dir.resolve()))}" if args.data_dir else ""
    return command, obstacle


def result(out: Path, name: str) -> dict[str, Any] | None:
    """The result of a part; None if it has not written one."""
    path = out / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def run(part: Part, command: str, out: Path) -> str:
    """Runs a part in a process of its own; returns its status. It is done once it has written its result."""
    path, log = out / f"{part.name}.json", out / f"{part.name}.log"
    path.unlink(missing_ok=True)
    module, *arguments = shlex.split(command)
    # An interrupted part finds its compiled programs here.
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(out / "compiled"), "TORCHINDUCTOR_CACHE_DIR": str(out / "inductor")}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{module}", *arguments, f"--out={path}"],
            cwd=REPOSITORY,
            env=MEMORY | compiled | os.environ,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(part.seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop(process)
    if path.exists():
        return "done"
    if code is None:
        return f"out of time: stopped after {part.seconds} s"
    lines = log.read_text(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return f"failed with exit code {code}: {last}"


def stop(process: subprocess.Popen) -> None:
    """Ends a process and its children."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def report(states: States, out: Path) -> str:
    """The text of gpu.md: the status of every part, then the results of the finished ones."""
    rows = [{"part": name, "status": state["status"], "seconds": state["seconds"]} for name, state in states.items()]
    sections = ["# Results of benchmarks.gpu", timing.table(rows)]
    for name, state in states.items():
        found = result(out, name) if state["status"] == "done" else None
        if found is not None:
            sections += [f"## {name}", *about(found), f"`python -m benchmarks.{state['command']}`"]
    return "\n\n".join(sections) + "\n"


def about(found: dict[str, Any]) -> list[str]:
    """A part's device, date and versions, its table, and its ratios."""
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    where = f"{found['device']}, {found['cpu_cores']} CPU cores, {found['date']}; {versions}."
    ratios = [f"- {name}: {in_words(value)}" for name, value in found.items() if name not in FACTS]
    return [where, timing.table(found["rows"]), *(["\n".join(ratios)] if ratios else [])]


def in_words(value: Any) -> str:
    """A figure, or a result of `timing.best_ratio`, in words."""
    if isinstance(value, dict) and "theirs" in value:
        return f"{value['theirs']} took {timing.cell(value['theirs / ours'])} times as long as {value['ours']}"
    return timing.cell(value)


if __name__ == "__main__":
    commands.exit_with(main)
