r"""The effect of each of several changes: runs with none of them, with each alone, with all but each, and with all.

    python -m experiments.changes --base=configs/digits_fixed.py --workdir=runs/changes --seeds=3 \
        --change model.prediction=eps --change objective.timesteps=uniform

The effect of a change depends on the others. So each change has two rows: its effect alone, and its effect beside all
the others. Both are differences between runs of the same seed. They are in bits/dim of the validation images if some
are set aside (data.validation), so a choice may be based on them. Otherwise they are in bits/dim of the test images.
Everything else is as in `experiments.sweep`. Writes a sweep's report and changes.md into the working directory.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusion.experiment import config as config_lib
from diffusion.runtime import files
from experiments import intervals, results, sweep, tables
from experiments.commands import exit_with
from experiments.results import FinishedRun
from experiments.sweep_grid import Cell

NONE, ALL = "none", "all"
FILE = "changes.md"
PARTS = {"bits/dim": "bpd", "L_0": "decoder_bpd", "KL": "kl_bpd"}  # keys of summary.json, after the split's name


def cells(base: str, changes: Mapping[str, str], seeds: Sequence[str], extra: Mapping[str, str]) -> list[Cell]:
    """The runs with each seed. A single change has only the runs with it and without it.

    Of two changes, all but one is the other alone, which is run once.

    Args:
        changes: config key -> the value that changes it.
        extra: config key -> value, for every run.

    Raises:
        ValueError: `extra` sets a key of `changes`.
    """
    if both := sorted(changes.keys() & extra.keys()):
        raise ValueError(f"--set {both[0]}={extra[both[0]]} is a change of this study")
    settings = {NONE: {}} | {_only(key): {key: value} for key, value in changes.items()}
    if len(changes) > 1:
        settings |= {_without(left, changes): _but(changes, left) for left in changes} | {ALL: dict(changes)}
    return [
        Cell(_folder(name, seed), base, dict(extra) | keys | {"seed": seed})
        for name, keys in settings.items()
        for seed in seeds
    ]


def _but(changes: Mapping[str, str], left: str) -> dict[str, str]:
    return {key: value for key, value in changes.items() if key != left}


def _only(key: str) -> str:
    return f"only-{key}"


def _without(key: str, changes: Mapping[str, str]) -> str:
    others = list(_but(changes, key))
    return _only(*others) if len(others) == 1 else f"without-{key}"


def _folder(name: str, seed: str) -> str:
    return f"{name}-seed{seed}"


def report(runs: Sequence[FinishedRun], changes: Mapping[str, str], seeds: Sequence[str]) -> str:
    """The bits/dim without and with all changes, and the effect of each change alone and beside all others."""
    by_name = {run.name: run for run in runs}
    split = "validation" if all("validation_bpd" in run.summary for run in runs) else "test"

    def values(name: str, part: str) -> dict[str, float]:
        found = {seed: by_name.get(_folder(name, seed)) for seed in seeds}
        return {seed: run.summary[f"{split}_{part}"] for seed, run in found.items() if run}

    counts = []  # of the seeds in each row: a study may be half finished

    def row(words: str, name: str, less: str = "") -> list[str]:
        of_parts = [values(name, part) for part in PARTS.values()]
        if less:
            pairs = zip(of_parts, PARTS.values(), strict=True)
            of_parts = [intervals.paired(of_part, values(less, part)) for of_part, part in pairs]
        counts.append(len(of_parts[0]))
        return [words, *(_text(list(of_part.values()), signed=bool(less)) for of_part in of_parts)]

    several = changes if len(changes) > 1 else {}
    absolute = [row("none of them", NONE), *([row("all of them", ALL)] if several else [])]
    alone = [row(f"`{key}={value}`", _only(key), NONE) for key, value in changes.items()]
    beside = [row(f"`{key}={value}`", ALL, _without(key, changes)) for key, value in several.items()]
    heads = {
        "with": absolute,
        "one change, less none": alone,
        "all changes, less all but this one": beside,
    }
    written = [tables.markdown([words, *PARTS], lines) for words, lines in heads.items() if lines]
    found = [count for count in counts if count]
    caption = f"Bits/dim of the {split} images: {intervals.caption(found) if found else 'no run is finished'}."
    return "\n".join([f"# {len(changes)} changes", "", caption, "", *written])


def earlier_folders(cells: Sequence[Cell], directory: Path, changes: Mapping[str, str]) -> dict[str, str]:
    """A cell's name -> the folder in which an earlier version finished the cell, which is not finished in its own.

    Those versions ran each of two changes twice: alone, and as all but the other one.
    """
    found = {}
    for cell in cells:
        setting, _, seed = cell.name.rpartition("-seed")
        for key in changes:
            earlier = cell._replace(name=_folder(f"without-{key}", seed))
            is_twin = len(changes) == 2 and setting == _without(key, changes)
            if is_twin and _is_trained(earlier, directory) and not _is_trained(cell, directory):
                found[cell.name] = earlier.name
    return found


def _is_trained(cell: Cell, directory: Path) -> bool:
    return sweep.is_done(cell, directory / cell.name, with_quality=False)


def check_values(cells: Sequence[Cell], finished: Sequence[FinishedRun], changes: Mapping[str, str]) -> None:
    """Raises a ValueError if a run has another value of a change than the one that the report would name."""
    by_name = {run.name: run.config for run in finished}
    for cell in cells:
        wanted, known = config_lib.flatten(cell.config()), by_name.get(cell.name, {})
        for key in sorted(changes.keys() & known.keys()):
            if config_lib.first_spelling(known[key]) != config_lib.first_spelling(wanted[key]):
                other = f"{key}={known[key]}, not {wanted[key]}"
                raise ValueError(f"{cell.name} was run with {other}; give that value or take another --workdir")


def _text(values: Sequence[float], signed: bool) -> str:
    return intervals.text(intervals.of_mean(values), 3, signed) if values else "–"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = sweep.argument_parser(__doc__)
    parser.add_argument("--base", default="configs/digits_fixed.py", help="the config file without changes")
    words = "a config key and the value that changes it; can be given several times"
    parser.add_argument("--change", action="append", required=True, metavar="KEY=VALUE", help=words)
    arguments = parser.parse_args(argv)
    changes, seeds = _changes(arguments), sweep.seeds(arguments, ["0", "1", "2"])
    runs = cells(arguments.base, changes, seeds, sweep.overrides(arguments.set))
    earlier = earlier_folders(runs, arguments.workdir, changes)
    in_folders = [cell._replace(name=earlier.get(cell.name, cell.name)) for cell in runs]
    code = sweep.execute(arguments, in_folders, lambda run: None)
    if code or arguments.list or arguments.index is not None:
        return code
    name_of = {folder: name for name, folder in earlier.items()}
    finished = results.read(arguments.workdir)[0]
    finished = [dataclasses.replace(run, name=name_of.get(run.name, run.name)) for run in finished]
    check_values(runs, finished, changes)
    text = report(finished, changes, seeds)
    files.write_text(arguments.workdir / FILE, text)
    print(text)
    return 0


def _changes(arguments: argparse.Namespace) -> dict[str, str]:
    found = sweep.overrides(arguments.change, "--change")
    if len(found) < len(arguments.change):
        raise ValueError("--change names a key twice")
    return found


if __name__ == "__main__":
    exit_with(main)
