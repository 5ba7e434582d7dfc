r"""Many runs of main.py, each in its own process and folder, so that a failed run does not affect the others.

    python -m experiments.sweep --base=configs/digits_fixed.py --workdir=runs/sweep \
        --variance=fixed_small,fixed_large --axis optim.grad_clip=0,1 --seeds=3

Every combination of the axes' values is a setting, and each setting is run with every seed. Any config key can be an
axis. An axis without values has the base config's value. The report has the mean over seeds with its interval, and the
difference to the first setting, seed by seed. Finished runs are skipped and interrupted ones resume, so a killed sweep
continues when it is started again. A signal loses nothing, and the exit code is 75. A kill loses the work of the
running cell since its last checkpoint.
"""

import argparse
import contextlib
import fcntl
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
from ml_collections import ConfigDict

from diffusion.evaluation import images
from diffusion.experiment import config as config_lib
from diffusion.experiment import rules, workdir
from diffusion.programs import quality
from diffusion.reporting import page
from diffusion.reporting.metrics_log import read_metrics
from diffusion.reporting.progress import Progress
from diffusion.runtime import preemption
from experiments import commands, sweep_report
from experiments.results import AXES, LOG, TargetOf, last_line
from experiments.sweep_grid import Cell, further_axes, grid, split_values

MAIN = Path(__file__).resolve().parents[1] / "main.py"


def possible(cells: list[Cell]) -> tuple[list[Cell], dict[str, list[str]]]:
    """The cells that can be trained, and the others' names by the reason why they cannot.

    Raises:
        ValueError: no cell can be trained, none would be scored, or a key or a value does not exist: a mistake, not a
            gap in the grid.
    """
    kept, excluded = [], {}
    for cell in cells:
        config = cell.config()
        if config.eval.num_images == images.NONE:
            raise ValueError("eval.num_images=-1 scores no image, and a sweep compares scores; take a small number")
        try:
            rules.check(config)
            kept.append(cell)
        except ValueError as error:
            excluded.setdefault(str(error), []).append(cell.name)
    if not kept:
        raise ValueError(f"no cell of the sweep is possible: {'; '.join(excluded)}")
    return kept, excluded


def run_cell(cell: Cell, directory: Path, watch: Callable[[str], None], with_quality: bool = True) -> str:
    """Trains and scores one cell in `directory` and measures its samples. Skips finished parts.

    Returns the reason of a failure, or "". `watch` is called with the progress every few seconds.
    """
    try:
        config = workdir.continued(cell.config(), directory, cell.overrides)
        workdir.check(config, directory)
        _check_scored_alike(config, directory)
        if is_done(cell, directory, with_quality):
            return ""
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / LOG).open("a") as log:
            # The run holds this lock as its standard output. So a restarted sweep waits for a run that a killed sweep
            # left behind, and two sweeps can share a folder.
            watch("waits for another process")
            fcntl.flock(log, fcntl.LOCK_EX)
            _check_scored_alike(config, directory)  # again: another sweep may have finished it meanwhile
            workdir.claim(config, directory)
            code = 0
            if not workdir.is_finished(directory):
                code = _run(cell, "train", directory, log, watch)
            if not code and with_quality and not quality.is_measured(config, directory):
                code = _run(cell, "quality", directory, log, watch)
    except (ValueError, OSError) as error:
        return str(error)
    return f"{last_line(directory)} (exit code {code}, see {directory / LOG})" if code else ""


def _check_scored_alike(config: ConfigDict, directory: Path) -> None:
    """Raises a ValueError if a finished run was scored with other values of eval.*: it is not scored again."""
    if not workdir.is_finished(directory, config):
        return
    now, then = (config_lib.flatten(of) for of in (config, workdir.read_config(directory)))
    keys = [key for key in now if key.startswith("eval.") and key != "eval.batch_size" and now[key] != then[key]]
    if keys:
        changes = "; ".join(f"{key}: {then[key]} → {now[key]}" for key in keys)
        raise ValueError(
            f"{directory} is finished and was scored with other values ({changes}); give those values again, take "
            "another --workdir, or score this run with main.py --mode=eval"
        )


def _run(cell: Cell, mode: str, directory: Path, log: TextIO, watch: Callable[[str], None]) -> int:
    """Runs main.py and returns its exit code. If a signal stopped the run, the sweep stops with the same code."""
    command = [sys.executable, str(MAIN), *cell.arguments(), f"--mode={mode}", f"--workdir={directory}"]
    print("$", shlex.join(command), file=log, flush=True)
    watch(f"{mode} starts")
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        while True:
            try:
                code = process.wait(timeout=5)
                if code == preemption.EXIT_CODE:
                    _stop()
                return code
            except subprocess.TimeoutExpired:
                rows = read_metrics(directory)
                if rows:
                    watch(f"{mode}, step {rows[-1]['step']}")
    finally:  # a sweep that is stopped leaves no run behind
        process.terminate()
        process.wait()


def run_cells(cells: list[Cell], directory: Path, with_quality: bool = True) -> dict[str, str]:
    """Runs the cells one after the other; returns the reasons of failures by the cell's name.

    A signal ends the running cell, which saves its state, and then the program.

    Args:
        with_quality: also measure samples.
    """
    failures = {}
    finished = sum(is_done(cell, directory / cell.name, with_quality) for cell in cells)
    with _stopped_by_signals(), Progress(len(cells), initial=finished, desc="sweep", unit="cell") as progress:
        for cell in cells:
            was_finished = is_done(cell, directory / cell.name, with_quality)

            def watch(words: str, name: str = cell.name) -> None:
                # In a log file, a line per cell is enough.
                progress.set_postfix_str(f"{name}: {words}", refresh=sys.stderr.isatty())

            if failure := run_cell(cell, directory / cell.name, watch, with_quality):
                failures[cell.name] = failure
            progress.update(not was_finished)
    return failures


def is_done(cell: Cell, directory: Path, with_quality: bool = True) -> bool:
    """Whether the cell is trained, scored and measured. A folder that cannot be read is not: `run_cell` says why."""
    try:
        config = workdir.continued(cell.config(), directory, cell.overrides)
        return workdir.is_finished(directory, config) and (not with_quality or quality.is_measured(config, directory))
    except (ValueError, OSError):
        return False


def argument_parser(description: str) -> argparse.ArgumentParser:
    """The flags that every sweep has."""
    parser = commands.argument_parser(description)
    parser.add_argument("--workdir", type=Path, required=True, help="directory for the report and a folder per cell")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="config keys for all cells"
    )
    of_seeds = parser.add_mutually_exclusive_group()
    of_seeds.add_argument("--seeds", type=int, metavar="N", help="run every setting with the seeds 0 to N − 1")
    of_seeds.add_argument("--seed", metavar="A,B,...", help="run every setting with these seeds")
    parser.add_argument("--index", type=int, help="run only the cell of this number in --list")
    parser.add_argument("--list", action="store_true", help="list the numbered cells and run nothing")
    parser.add_argument("--report", action="store_true", help="only rebuild the report from the folders")
    return parser


def seeds(arguments: argparse.Namespace, default: list[str]) -> list[str]:
    """The values of seed that --seeds or --seed asks for.

    Raises:
        ValueError: --seeds asks for none, or --set has a seed.
    """
    if seed := overrides(arguments.set).get("seed"):
        raise ValueError(f"--set seed={seed} would set the seed of every run; use --seed={seed}")
    if arguments.seeds is None:
        return list(dict.fromkeys(split_values(arguments.seed))) if arguments.seed else default
    if arguments.seeds < 1:
        raise ValueError(f"--seeds={arguments.seeds} must be at least 1")
    return [str(seed) for seed in range(arguments.seeds)]


def expected(cells: list[Cell], directory: Path) -> str:
    """The number of cells left to run, and their training time at the first measured speed."""
    left = [cell for cell in cells if not is_done(cell, directory / cell.name)]
    words = f"{len(cells)} cells, {len(left)} to run"
    for cell in cells:
        speeds = [row["images_per_second"] for row in read_metrics(directory / cell.name) if "images_per_second" in row]
        if len(speeds) > 1:  # the first row's time includes compilation
            configs = [cell.config().train for cell in left]
            minutes = sum(config.num_steps * config.batch_size for config in configs) / np.median(speeds[1:]) / 60
            return f"{words}: about {minutes:.0f} minutes of training at the speed of {cell.name}, plus their scores"
    return f"{words}; the time is known once the first one has logged some steps"


def indexed(arguments: argparse.Namespace, cells: list[Cell]) -> list[Cell]:
    """The cell of --index; without it, all cells. Raises a ValueError if no cell has that number."""
    if arguments.index is None:
        return cells
    if not 0 <= arguments.index < len(cells):
        raise ValueError(f"--index={arguments.index} must be in 0…{len(cells) - 1}")
    return [cells[arguments.index]]


def overrides(settings: list[str], flag: str = "--set") -> dict[str, str]:
    """["train.num_steps=500"] -> {"train.num_steps": "500"}."""
    for setting in settings:
        if "=" not in setting:
            raise ValueError(f"{flag} {setting} must be KEY=VALUE, for example train.num_steps=500")
    return dict(setting.split("=", 1) for setting in settings)


def execute(arguments: argparse.Namespace, cells: list[Cell], target_of: TargetOf) -> int:
    """Does what the flags of `argument_parser` say; returns the exit code: 1 if a cell failed."""
    cells, excluded = possible(cells)
    for reason, names in excluded.items():
        print(f"left out {', '.join(names)}: {reason}")
    if arguments.list:
        print("\n".join(f"{index} {cell.name}" for index, cell in enumerate(cells)))
        print(expected(cells, arguments.workdir), file=sys.stderr)
        return 0
    cells = indexed(arguments, cells)
    failures = {} if arguments.report else run_cells(cells, arguments.workdir)

    def write() -> None:
        print(sweep_report.write(arguments.workdir, target_of, [cell.name for cell in cells]))
        page.refresh(arguments.workdir)

    return exit_code(failures) if arguments.index is not None else reported(write, failures)


def reported(write: Callable[[], None], failures: dict[str, str]) -> int:
    """Writes the report; returns `exit_code`, which also prints the reasons if the report cannot be written.

    Raises:
        ValueError, OSError: the report cannot be written, and no cell failed.
    """
    try:
        write()
    except (ValueError, OSError) as error:
        if not failures:
            raise
        print(f"no report: {error}", file=sys.stderr)
    finally:
        code = exit_code(failures)
    return code


def exit_code(failures: dict[str, str]) -> int:
    """Prints why cells failed, after everything else; returns 1 if there are any."""
    sys.stdout.flush()  # or the table would come after the failures where both go into one file
    for name, reason in failures.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    return 1 if failures else 0


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Stops on signals, and restores the previous handlers afterwards, so that Ctrl-C does not end a notebook."""
    before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(*_: object) -> None:
    """Ends the program and with it the running cell, which saves its state."""
    print("stopped; the same command resumes", file=sys.stderr)
    sys.exit(preemption.EXIT_CODE)


def run_grid(
    argv: list[str] | None, description: str, defaults: dict[str, list[str]], target_of: TargetOf
) -> int:
    """Runs the command line of a sweep whose flags are the axes; `defaults` has the values of axes without a flag."""
    parser = argument_parser(description)
    parser.add_argument("--base", default="configs/digits_fixed.py", help="the config file that the cells start from")
    for axis, key in AXES.items():
        if axis != "seed":
            values = ",".join(defaults.get(axis, [])) or "the base config's"
            parser.add_argument(f"--{axis}", metavar="A,B,...", help=f"values of {key}; default: {values}")
    words = "values of any other config key; can be given several times"
    parser.add_argument("--axis", action="append", default=[], metavar="KEY=A,B,...", help=words)
    arguments = parser.parse_args(argv)
    base = Cell("base", arguments.base, {}).config()
    axes = {axis: defaults.get(axis, [str(base[key])]) for axis, key in AXES.items()}
    flags = {axis: split_values(given) for axis in AXES if axis != "seed" and (given := getattr(arguments, axis))}
    further = further_axes(arguments.axis)
    if twice := flags.keys() & further.keys():
        axis = min(twice)
        raise ValueError(f"--{axis} and --axis {AXES[axis]} are the same axis; give all of its values in one of them")
    axes |= flags | further
    axes["seed"] = seeds(arguments, axes["seed"])
    return execute(arguments, grid(arguments.base, axes, overrides(arguments.set)), target_of)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line."""
    return run_grid(argv, __doc__, {}, lambda run: None)


if __name__ == "__main__":
    commands.exit_with(main)
