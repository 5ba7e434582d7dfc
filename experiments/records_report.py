"""The table and the figure of the records, made from their folders."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from diffusion.reporting.metrics_log import read_metrics
from experiments import intervals, tables

SCORES = ("bits/dim, validation", "L_0", "KL", "less its start", "bits/dim, test")
SIZES = ("parameters", "GFLOP", "steps", "images/s", "samples")
NOTES = """\
Bits/dim: {over_seeds}; a cell of fewer seeds than its row's validation images
states its own n. "less its start": the differences to the record that it starts from, paired by seed, on validation
images. These choose a recipe; test images are scored at the end.
GFLOP: for one image in a training step. images/s: the median over a run's rows and over runs. It is the only number
here that depends on the machine.
"""


class Entry(NamedTuple):
    """A record in one budget.

    Attributes:
        name: the name of its file.
        minutes: the budget.
        start: the record or config that it starts from.
        idea: the idea in its header.
        flops: the FLOP of an image in a training step.
        runs: seed -> the contents of validation.json and test.json, and further facts of the run.
        samples: the path of the first run's samples from the working directory; "" for none.
        left_out: the path of other scores from the working directory -> why they are not in `runs`.
    """

    name: str
    minutes: int
    start: str
    idea: str
    flops: float
    runs: dict[str, dict[str, Any]]
    samples: str = ""
    left_out: Mapping[str, str] = MappingProxyType({})

    def by_seed(self, number: str) -> dict[str, float]:
        """A number of each seed that has it."""
        return {seed: run[number] for seed, run in self.runs.items() if run.get(number) is not None}


def images_per_second(directory: Path) -> float | None:
    """The median of a run's images per second; None if too few rows have it."""
    found = [row["images_per_second"] for row in read_metrics(directory) if "images_per_second" in row]
    return float(np.median(found)) if found else None


def markdown(entries: Sequence[Entry]) -> str:
    """A table for each budget, best first."""
    texts = ["# Records"]
    for minutes in dict.fromkeys(entry.minutes for entry in entries):
        of_budget = [entry for entry in entries if entry.minutes == minutes]
        rows = sorted((entry for entry in of_budget if entry.runs), key=_validation_bpd)
        texts.append(f"## {minutes} minutes of two CPU cores")
        if rows:
            by_name = {entry.name: entry for entry in rows}
            over_seeds = intervals.caption(len(entry.runs) for entry in rows)
            head = ["record", "starts from", *SCORES, *SIZES]
            texts += [NOTES.format(over_seeds=over_seeds), tables.markdown(head, [_row(row, by_name) for row in rows])]
        if left_out := [f"{path} ({why})" for entry in of_budget for path, why in entry.left_out.items()]:
            texts.append(f"Left out: {'; '.join(left_out)}.")
        texts += ["\n".join(f"- `{entry.name}`: {entry.idea}" for entry in rows)] if rows else []
    return "\n\n".join(texts) + "\n"


def _validation_bpd(entry: Entry) -> float:
    return intervals.of_mean(entry.by_seed("validation_bpd").values()).mean


def _row(entry: Entry, others: Mapping[str, Entry]) -> list[str]:
    start, own = others.get(entry.start), entry.by_seed("validation_bpd")
    less = intervals.paired(own, start.by_seed("validation_bpd")) if start else {}
    one = next(iter(entry.runs.values()))
    speed = entry.by_seed("images_per_second").values()
    return [
        entry.name,
        entry.start,
        *(_text(entry.by_seed(f"validation_{part}")) for part in ("bpd", "decoder_bpd", "kl_bpd")),
        _text(less, signed=True) + _fewer(less, own),
        _text(entry.by_seed("test_bpd")) + _fewer(entry.by_seed("test_bpd"), own),
        f"{one['num_params']:,}",
        f"{entry.flops / 1e9:.2f}",
        f"{one['steps']:,}",
        f"{np.median(list(speed)):.0f}" if speed else "–",
        f"[png]({entry.samples})" if entry.samples else "–",
    ]


def _text(by_seed: Mapping[str, float], signed: bool = False) -> str:
    return intervals.text(intervals.of_mean(by_seed.values()), 3, signed) if by_seed else "–"


def _fewer(by_seed: Mapping[str, float], of_row: Mapping[str, float]) -> str:
    """The number of seeds of a cell that has fewer than its row."""
    return f" (n = {len(by_seed)})" if 0 < len(by_seed) < len(of_row) else ""


def plot(path: Path, entries: Sequence[Entry]) -> None:
    """A panel per budget: bits/dim of the validation images for each seed, and the interval of their mean."""
    entries = [entry for entry in entries if entry.runs]
    budgets = list(dict.fromkeys(entry.minutes for entry in entries))
    if not budgets:
        return
    most = max(sum(entry.minutes == minutes for entry in entries) for minutes in budgets)
    figure = Figure(figsize=(5 * len(budgets) + 1, 1.4 + 0.32 * most), layout="constrained")
    for axes, minutes in zip(figure.subplots(1, len(budgets), squeeze=False)[0], budgets, strict=True):
        rows = sorted((entry for entry in entries if entry.minutes == minutes), key=_validation_bpd, reverse=True)
        for y, entry in enumerate(rows):
            values = list(entry.by_seed("validation_bpd").values())
            interval = intervals.of_mean(values)
            axes.plot(values, [y] * len(values), "|", color="black")
            half_width = 0 if np.isnan(interval.half_width) else interval.half_width
            axes.errorbar(interval.mean, y, xerr=half_width, fmt="o", color="tab:blue", capsize=3)
        axes.set_yticks(range(len(rows)), [entry.name for entry in rows], fontsize=8)
        axes.set(xlabel="bits/dim (validation)", title=f"{minutes} minutes of two CPU cores")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
