"""Times arms against one another on a busy machine, and writes the results as a table and JSON."""

import argparse
import datetime
import importlib.metadata
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion.reporting import summary
from experiments import commands

PAUSE_SECONDS = 0.05  # between two arms: OpenMP's and XLA's threads spin for a while before they sleep


def arguments(doc: str, name: str) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark has."""
    parser = commands.argument_parser(doc)
    parser.add_argument("--out", type=Path, default=Path(f"runs/benchmarks/{name}.json"), help="where the JSON goes")
    parser.add_argument("--rounds", type=count, default=7, help="how many times each arm is timed")
    return parser


def count(text: str) -> int:
    """A flag's value, as argparse's `type`: an integer ≥ 1."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer ≥ 1")
    return int(text)


class Cost(NamedTuple):
    """The cost of calls of an arm: numbers for one call, arrays [rounds] for all calls."""

    seconds: Any
    page_faults: Any  # minor ones: new memory from the system, without the disk
    busy: Any  # the CPU time of all threads, as a share of the cores' time


class Arm(NamedTuple):
    """A call that returns when its work is done, and the columns of its row that are not measured."""

    call: Callable[[], Any]
    columns: dict[str, Any] = {}


Arms = dict[str, Arm]


def num_cores() -> int:
    """The cores that this process may use; where the system does not say (macOS), all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cost(call: Callable[[], Any]) -> Cost:
    """The cost of one call in this process."""
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    call()
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    busy = cpu_seconds / (seconds * num_cores())
    return Cost(seconds, after.ru_minflt - before.ru_minflt, busy)


def warm(arms: Arms) -> Arms:
    """The arms, after two calls of each."""
    for arm in arms.values():
        arm.call(), arm.call()
    return arms


def alternate(measure: Callable[[str], Cost], names: list[str], rounds: int) -> dict[str, Cost]:
    """The costs of every arm: A B C, B C A, C A B, …, one at a time.

    The load of the machine changes from second to second, so only times of the same round are comparable. The order
    changes, too, so that no arm always follows the same one.
    """
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(PAUSE_SECONDS)
            costs[name].append(measure(name))
    return {name: Cost(*map(np.array, zip(*found, strict=True))) for name, found in costs.items()}


def in_this_process(arms: Arms, rounds: int) -> dict[str, Cost]:
    """The costs of arms that share a process."""
    warm(arms)
    return alternate(lambda name: cost(arms[name].call), list(arms), rounds)


def rows(costs: dict[str, Cost], columns: Callable[[str, np.ndarray], dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each arm: its name, columns(name, seconds of a call [rounds]), page faults and busy share of a call."""
    return [{"arm": name} | columns(name, found.seconds) | load(found) for name, found in costs.items()]


def load(found: Cost) -> dict[str, Any]:
    """The columns that every row has."""
    return {"page faults": quartiles(found.page_faults), "busy share": quartiles(found.busy)}


def quartiles(values: np.ndarray) -> dict[str, float]:
    """The median and the spread around it."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "quartile_1": low, "quartile_3": high}


def best_ratio(seconds: dict[str, np.ndarray], ours: list[str], theirs: list[str]) -> dict[str, Any]:
    """The time of their fastest arm divided by the time of our fastest, round by round."""
    our_best, their_best = (min(names, key=lambda name: np.median(seconds[name])) for names in (ours, theirs))
    ratio = quartiles(seconds[their_best] / seconds[our_best])
    return {"ours": our_best, "theirs": their_best, "theirs / ours": ratio}


def cell(value: Any) -> str:
    """A number with its spread, as a table shows it."""
    if isinstance(value, dict):
        return f"{value['median']:.4g} ({value['quartile_1']:.4g}–{value['quartile_3']:.4g})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as a markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(cell(value) for value in row.values()) + " |" for row in rows]
    return "\n".join(lines)


def finish(out: Path, settings: dict[str, Any], rows: list[dict[str, Any]], **more: Any) -> None:
    """Prints the table and writes everything as JSON, with the facts that the numbers depend on."""
    versions = summary.versions()
    for package in ("torch", "diffusers", "torch-fidelity"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    facts = {
        "date": datetime.date.today().isoformat(),
        "device": summary.device_name(),
        "cpu_cores": num_cores(),
        "load_average": os.getloadavg()[0],
        "versions": versions,
        "settings": {name: value for name, value in settings.items() if name != "out"},
        "rows": rows,
    }
    print(table(rows))
    for name, value in more.items():
        print(f"\n{name}: {json.dumps(value, ensure_ascii=False)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    summary.write_json(out, facts | more)
    print(f"\n{facts['date']}, {facts['device']}, {facts['cpu_cores']} CPU cores; {out}")
