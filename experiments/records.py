r"""Bits/dim of photographs at equal compute: a table of records. Each record is one config file with three seeds.

    python -m experiments.records --workdir=runs/records --data-dir=DIR --minutes=8
    python -m experiments.records --workdir=runs/records --data-dir=DIR --minutes=8 --records=vlb,all_four
    python -m experiments.records --workdir=runs/records --data-dir=DIR --minutes=8 --records=all_four --test

A record is a file in configs/records/; its header names the config that it starts from. If the header has a line
"Weights", the record scores the weights of the record named there with a variance of its own. A budget is an amount of
arithmetic, so the machine does not matter. It is the work that two quiet CPU cores do in 8, 33 or 120 minutes with the
base's network. The budget, the network's and the optimizer's cost determine the number of steps.

Training sees no test image. At its end validation images that no step saw are scored, and a recipe is chosen by them.
`--test` scores test images of finished runs; use it once, for the chosen recipe. Writes records.md and records.png into
the working directory. Finished runs are skipped and interrupted ones resume, as in `experiments.sweep`.
"""

import argparse
import ast
import functools
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diffusion.evaluation.bound import estimated_bound
from diffusion.evaluation.images import NONE, subset
from diffusion.experiment import build, rules, schema, workdir
from diffusion.experiment import config as config_lib
from diffusion.experiment.config import from_file
from diffusion.programs import sample
from diffusion.programs.describe import forward_flops, optimizer_flops
from diffusion.reporting import page, summary
from diffusion.reporting.page.numbers import is_of_other_weights
from diffusion.runtime import devices, files
from diffusion.runtime.digests import short_sha256
from experiments import records_report, sweep
from experiments.commands import exit_with
from experiments.records_report import Entry
from experiments.results import WITHIN_A_ROW
from experiments.sweep_grid import Cell

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("configs", "records")
# The FLOP of a training, by its minutes on two quiet CPU cores without compilation. `hybrid` trains 42 images per
# second there (jax 0.10.1, 2026-11-30), which is 0.102 TFLOP/s.
BUDGETS = {8: 4.9e13, 33: 2.02e14, 120: 7.35e14}
NUM_VALIDATION = 2000  # training images that are set aside
NUM_SCORED, NUM_TERMS = 1000, 9  # scored images of a split, and terms per image
CIFAR10 = (32, 32, 3)
_flops: dict[tuple[str, int, str], tuple[float, float]] = {}  # of a forward pass and of an update


def names() -> list[str]:
    """Every record. A record comes after the one that it starts from."""
    found = sorted(path.stem for path in (ROOT / FOLDER).glob("*.py"))
    ordered: list[str] = []

    def add(name: str) -> None:
        if name in found and name not in ordered:
            add(starts_from(name))
            ordered.append(name)

    for name in found:
        add(name)
    return ordered


def starts_from(name: str) -> str:
    """The name after "From" in a record's header: another record, or any other config file."""
    return _header(name, "From")


def weights_of(name: str) -> str:
    """The record whose weights are scored: the one that the header names after "Weights", or this one itself."""
    return _header(name, "Weights", default=name)


def _header(name: str, label: str, default: str = "") -> str:
    docstring = ast.get_docstring(ast.parse(Path(file(name)).read_text(encoding="utf-8"))) or ""
    for line in docstring.splitlines():
        if line.startswith(f"{label} "):
            return line.removeprefix(label).strip()
    if default:
        return default
    raise ValueError(f"{FOLDER / name}.py: its header must have a line that begins with {label!r}")


def file(name: str) -> str:
    """A record's config file, as --config takes it."""
    return str(ROOT / FOLDER / f"{name}.py")


def flops_per_image(name: str) -> float:
    """The FLOP of an image in a training step: three forward passes through the network, and its part of the update."""
    config = from_file(file(name), {})
    experiment = build.experiment(config, CIFAR10, num_levels=256, num_classes=10)
    key = str(experiment.training.network), experiment.p.output_channels(CIFAR10[-1]), config.optim.name
    if key not in _flops:  # counting takes seconds, and many records have the same network
        if not _flops:
            print("counting the arithmetic of each network, some seconds for each", file=sys.stderr, flush=True)
        update = optimizer_flops(experiment.training.optimizer, experiment.abstract_state().params)
        _flops[key] = forward_flops(experiment), update
    of_network, of_update = _flops[key]
    return 3 * of_network + of_update / config.train.batch_size


def num_steps(name: str, minutes: int) -> int:
    """The number of training steps of a record in a budget."""
    batch_size = from_file(file(name), {}).train.batch_size
    return max(1, int(BUDGETS[minutes] / (flops_per_image(name) * batch_size)))


def cells(
    chosen: Sequence[str], minutes: int, seeds: Sequence[str], extra: dict[str, str], counts: bool = True
) -> list[Cell]:
    """The runs of some records with each seed; the overrides in `extra` apply to all.

    Args:
        counts: whether to set train.num_steps, which takes seconds for each network.
    """
    own = {"data.validation": str(NUM_VALIDATION), "eval.num_images": str(NONE)}
    made = []
    for name in dict.fromkeys(map(weights_of, chosen)):
        keys = own
        if counts:
            keys = own | dict.fromkeys(("train.num_steps", "train.checkpoint_every"), str(num_steps(name, minutes)))
        made += [Cell(folder(name, minutes, seed), file(name), keys | {"seed": seed} | extra) for seed in seeds]
    return made


def folder(name: str, minutes: int, seed: str) -> str:
    return f"{minutes}min-{name}-seed{seed}"


def scores_file(name: str, split: str) -> str:
    """The name of a record's scores in the folder of its weights."""
    return f"{split}.json" if weights_of(name) == name else f"{split}-{name}.json"


def score(directory: Path, name: str, split: str) -> None:
    """Estimates the bound of images of a split with the record's variance, unless it is known."""
    loaded = workdir.load(directory, claims=False)
    config, source = scored(loaded.config), getattr(build.load_splits(loaded.config), split)
    numbers = subset(len(source), min(NUM_SCORED, len(source)))
    model = loaded.model_with("model" if weights_of(name) == name else from_file(file(name), {}).model.variance)
    about = {
        "ema_sha256": loaded.state.sha256,
        "data_sha256": source.sha256(),
        "variance": model.p.variance,
        "terms_per_image": NUM_TERMS,
        f"{split}_images": len(numbers),
    }
    path = directory / scores_file(name, split)
    if _are_of(summary.read_json(path), about):
        return
    unfinished = directory / f"unfinished_{path.stem}-{short_sha256(about)}.npy"
    bound = estimated_bound(build.bound_settings(config))(devices.replicate(model), source, numbers, unfinished)
    summary.write_json(path, bound.summary(split) | about)
    for kept in directory.glob(f"{unfinished.stem}*"):
        kept.unlink()


def _are_of(scores: dict[str, Any] | None, about: dict[str, Any]) -> bool:
    """Whether a file's scores are of these weights, images and settings.

    Files of earlier versions lack some settings. Their scores are kept.
    """
    has_weights = scores is not None and "ema_sha256" in scores
    return has_weights and all(scores.get(key, value) == value for key, value in about.items())


def scored(config: ConfigDict) -> ConfigDict:
    """A run's config with the settings by which every record is scored."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.eval.terms_per_image, config.eval.protocol, config.eval.noises_per_term = NUM_TERMS, "exact", 1
    return config


def main(argv: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = sweep.argument_parser(__doc__)
    parser.add_argument("--minutes", type=int, choices=BUDGETS, default=min(BUDGETS), help="the budget")
    parser.add_argument("--records", metavar="A,B,...", help="files of configs/records/; default: all")
    parser.add_argument("--data-dir", help="directory of data sets prepared by TFDS; default: ~/tensorflow_datasets")
    parser.add_argument("--test", action="store_true", help="score test images of these records' finished runs, too")
    arguments = parser.parse_args(argv)
    extra = sweep.overrides(arguments.set) | ({"data.data_dir": arguments.data_dir} if arguments.data_dir else {})
    wanted = chosen(arguments)
    seeds = sweep.seeds(arguments, ["0", "1", "2"])
    runs = cells(wanted, arguments.minutes, seeds, extra, counts=not arguments.list)
    for cell in runs:
        rules.check(cell.config())
    if arguments.list:
        print("\n".join(f"{index} {cell.name}" for index, cell in enumerate(runs)))
        return 0
    failures = {} if arguments.report else run(arguments, wanted, runs)
    if arguments.index is not None:
        return sweep.exit_code(failures)
    return sweep.reported(functools.partial(write, arguments.workdir), failures)


def chosen(arguments: argparse.Namespace) -> list[str]:
    """The records in --records; without it, all records.

    Raises:
        ValueError: a record does not exist, or --test is given without --records.
    """
    known = names()
    if arguments.test and not arguments.records:
        raise ValueError("--test is for records that validation images chose: name them with --records=A,B")
    wanted = sweep.split_values(arguments.records) if arguments.records else known
    for name in wanted:
        if name not in known:
            raise ValueError(f"--records: there is no {FOLDER / name}.py; there are {', '.join(known)}")
    return wanted


def run(arguments: argparse.Namespace, wanted: Sequence[str], runs: list[Cell]) -> dict[str, str]:
    """Trains and scores; returns the reasons of failures by the run's name."""
    failures = sweep.run_cells(sweep.indexed(arguments, runs), arguments.workdir, with_quality=False)
    splits = ("validation", "test") if arguments.test else ("validation",)
    trained = [cell for cell in sweep.indexed(arguments, runs) if cell.name not in failures]
    for cell, name, split in itertools.product(trained, wanted, splits):
        if weights_of(name) == Path(cell.base).stem:
            try:
                score(arguments.workdir / cell.name, name, split)
            except (ValueError, OSError) as error:
                failures[cell.name] = str(error)
    return failures


def write(directory: Path) -> None:
    """Rebuilds records.md and records.png from the folders; prints the table."""
    entries = [entry for minutes in BUDGETS for name in names() if (entry := entry_of(directory, name, minutes))]
    text = records_report.markdown(entries)
    files.write_text(directory / "records.md", text)
    records_report.plot(directory / "records.png", entries)
    page.refresh(directory)
    print(text)


def entry_of(directory: Path, name: str, minutes: int) -> Entry | None:
    """The results of one record in one budget, from its folders; None if no run was scored."""
    found: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    first = None
    prefix = folder(weights_of(name), minutes, "")
    for path in sorted(directory.glob(f"{prefix}*/{scores_file(name, 'validation')}")):
        run = path.parent
        of_run, scores = summary.read_json(run / workdir.SUMMARY), summary.read_json(path)
        if not scores:
            continue
        if reason := _why_left_out(run, scores, of_run, first):
            left_out[str(path.relative_to(directory))] = reason
            continue
        first = first or run
        on_test = summary.read_json(path.with_name(scores_file(name, "test"))) or {}
        on_test = on_test if on_test.get("ema_sha256") == scores.get("ema_sha256") else {}  # of another training
        found[run.name.removeprefix(prefix)] = _facts(run, of_run) | scores | on_test
    if not found and not left_out:
        return None
    samples = next((path for seed in found if (path := directory / f"{prefix}{seed}" / sample.GRID).exists()), None)
    shown = str(samples.relative_to(directory)) if samples else ""
    return Entry(name, minutes, starts_from(name), _header(name, "Idea"), flops_per_image(name), found, shown, left_out)


def _why_left_out(directory: Path, scores: dict[str, Any], of_run: dict[str, Any] | None, first: Path | None) -> str:
    """Why a run's scores do not belong in the row of the run in `first`; "" if they do."""
    if of_run is None:
        return "the run has no summary.json"
    if is_of_other_weights(scores, of_run):  # the run trained further after they were made
        return "of other weights than summary.json"
    try:
        keys = _differing_keys(*(workdir.read_config(run) for run in (directory, first or directory)))
    except (ValueError, OSError) as error:
        return str(error)
    return f"the config differs from {first.name}'s in {', '.join(keys)}" if keys else ""


def _differing_keys(*configs: ConfigDict) -> list[str]:
    """The keys that differ between configs and affect the scores. Every record is scored with the same eval.*."""
    flat = [config_lib.flatten(config) for config in configs]
    found = []
    for name, key in schema.all_keys().items():
        values = {str(config_lib.first_spelling(of.get(name, key.when_absent))) for of in flat}
        if len(values) > 1 and name not in WITHIN_A_ROW and not name.startswith("eval."):
            found.append(name)
    return found


def _facts(directory: Path, of_run: dict[str, Any]) -> dict[str, Any]:
    """Further facts of a run for the table: its size, length and speed."""
    config = workdir.read_config(directory)
    speed = records_report.images_per_second(directory)
    return {"num_params": of_run["num_params"], "steps": config.train.num_steps, "images_per_second": speed}


if __name__ == "__main__":
    exit_with(main)
