"""Timing arms against one another on a machine that is never quiet, and the results as a table and JSON."""

import argparse
import datetime
import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.reporting import summary

PAUSE_SECONDS = 0.05  # between two arms: OpenMP's and XLA's threads spin for a while before they sleep


def arguments(doc: str, name: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(f"runs/benchmarks/{name}.json"), help="where the JSON goes")
    parser.add_argument("--rounds", type=int, default=7, help="how often every arm is timed")
    return parser


def alternate(arms: dict[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of every arm in every round: A B C, A B C, …, all in this process, one at a time.

    The load of the machine changes from second to second, so that only times of the same round compare. Every arm
    runs twice before the first round and must not return before its work is done.
    """
    for arm in arms.values():
        arm(), arm()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            time.sleep(PAUSE_SECONDS)
            started = time.perf_counter()
            arm()
            seconds[name].append(time.perf_counter() - started)
    return {name: np.array(values) for name, values in seconds.items()}


def quartiles(values: np.ndarray) -> dict[str, float]:
    """The median and the spread around it."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "quartile_1": low, "quartile_3": high}


def best_ratio(seconds: dict[str, np.ndarray], ours: list[str], theirs: list[str]) -> dict[str, Any]:
    """How many times as long the fastest of their arms takes as the fastest of ours, round by round."""
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
    """Prints the table and writes everything as JSON, with what the numbers depend on."""
    versions = summary.versions()
    for package in ("torch", "diffusers", "torch-fidelity"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    facts = {
        "date": datetime.date.today().isoformat(),
        "device": summary.device_name(),
        "cpu_cores": len(os.sched_getaffinity(0)),
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
