"""The page of a sweep: a table of its runs with their scores and differing config keys, further tables, and plots."""

import csv
import io
import itertools
import urllib.parse
from typing import Any, NamedTuple

from markupsafe import Markup

from diffusion.reporting.distance_kind import DistanceKind, distance_kind
from diffusion.reporting.page import numbers, parts
from diffusion.reporting.page.contents import Contents
from diffusion.reporting.page.parts import UNKNOWN, is_number, number, text_of, with_error
from diffusion.reporting.page.run import CONFIG, MAX_PLOT_BYTES, QUALITY, SUMMARY, flat

TABLE, REPORT = "table.csv", "table.md"  # a sweep's numbers, means over seeds
HALF_WIDTH = "_half_width"  # NAME_half_width: of the 95% interval of the number in the column NAME
INTERVALS = "mean ± 95% interval over seeds (Student's t); one seed has no interval"
KIND = ("features", "features_sha256", "num_samples", "sampler", "reference")  # columns of table.csv
MAX_PLOTS = 8
NOT_SETTINGS = ("data.data_dir",)  # differs between machines


class RunFiles(NamedTuple):
    """A run of a sweep: the name of its folder and the contents of its files."""

    name: str
    config: dict[str, Any]
    summary: dict[str, Any]
    quality: dict[str, Any]


def names(contents: Contents) -> list[str]:
    """The names of the folders that hold runs."""
    return [name.removesuffix(f"/{CONFIG}") for name in contents.matching(f"*/{CONFIG}")]


def page(contents: Contents, run_page: str) -> str:
    """The HTML of a sweep's page. It links to the runs' pages, whose file name is `run_page`."""
    runs = []
    for name in names(contents):
        config, summary, quality = (contents.json(f"{name}/{file}") for file in (CONFIG, SUMMARY, QUALITY))
        is_of_others = numbers.is_of_other_weights(quality, summary)
        runs.append(RunFiles(name, flat(config), summary, {} if is_of_others else quality))
    finished = [run for run in runs if run.summary]
    data = sorted({text_of(run.config.get("data.name")) for run in runs})
    plots = [
        parts.figure(contents, name, f"The plot {name}", name, MAX_PLOT_BYTES, is_plot=True)
        for name in contents.matching("*.png")[:MAX_PLOTS]
    ]
    sections = [
        ("runs", "Runs", _runs(contents, runs, run_page)),
        ("tables", "Tables", _tables(contents)),
        ("plots", "Plots", plots),
        ("report", "Report", [parts.folded(REPORT, contents.text(REPORT))]),
    ]
    return parts.render(
        title=contents.directory.resolve().name,
        kicker=" · ".join(["sweep", *data]),
        lead=_lead(len(finished), len(runs) - len(finished)) if runs else "",
        cards=_mean_cards(contents.text(TABLE)) or _cards(finished),
        problems=contents.problems,
        sections=sections,
    )


def _lead(finished: int, begun: int) -> str:
    """The numbers of finished and begun runs. The folders do not say how many more are planned."""
    return f"runs: {finished} finished" + (f", {begun} begun" if begun else "")


def _mean_cards(table: str) -> dict[str, str]:
    """The setting with the lowest mean over seeds of each number in table.csv; {} if none has several seeds.

    The best of all runs would be the luckiest seed. Bits/dim are of validation images, if there are any.
    """
    lines = list(csv.DictReader(io.StringIO(table)))
    if not any(_float(line.get("seeds")) > 1 for line in lines):
        return {}
    has_validation = any(is_number(_float(line.get("validation_bpd"))) for line in lines)
    titles = {"validation_bpd": "validation bits/dim"} if has_validation else {"test_bpd": "bits/dim"}
    kinds = {tuple(line.get(name) or "" for name in KIND) for line in lines if line.get("features")}
    if len(kinds) == 1:
        scores = {"frechet_distance": 0, "features": kinds.pop()[0]}
        titles["frechet_distance"] = numbers.distance(scores).title
    cards = {}
    for column, title in titles.items():
        known = [line for line in lines if is_number(_float(line.get(column)))]
        if known:
            best = min(known, key=lambda line: _float(line[column]))
            setting = ", ".join(best[name] for name in itertools.takewhile("seeds".__ne__, best))
            value, half_width = _float(best[column]), _float(best.get(column + HALF_WIDTH))
            cards[f"lowest mean {title}, {best['seeds']} seeds: {setting}"] = with_error(value, half_width)
    return cards


def _cards(finished: list[RunFiles]) -> dict[str, str]:
    """The best run by each score."""
    cards = {}
    for name, title in (("validation_bpd", "validation bits/dim"), ("test_bpd", "bits/dim")):
        if scored := [run for run in finished if is_number(run.summary.get(name))]:
            best = min(scored, key=lambda run: run.summary[name])
            cards[f"lowest {title}: {best.name}"] = with_error(best.summary[name], best.summary.get(f"{name}_stderr"))
            break
    distances = [(run, distance) for run in finished if (distance := numbers.distance(run.quality))]
    if len({distance_kind(run.config, run.quality) for run, _ in distances}) == 1:
        best, distance = min(distances, key=lambda pair: pair[1].value)
        cards[f"lowest {distance.title}: {best.name}"] = number(distance.value, ".4g")
    return cards


def _titles(kinds: list[DistanceKind | None]) -> dict[DistanceKind, str]:
    """The heading of each kind: the features, and what else differs between kinds of these features."""
    known = list(dict.fromkeys(kind for kind in kinds if kind))
    titles = {}
    for kind in known:
        alike = [other for other in known if other.title == kind.title]
        differing = [name for name in kind._fields if len({getattr(other, name) for other in alike}) > 1]
        facts = [f"{name.replace('_', ' ')}: {getattr(kind, name) or UNKNOWN}" for name in differing]
        titles[kind] = "; ".join([kind.title, *facts])
    return titles


def _runs(contents: Contents, runs: list[RunFiles], run_page: str) -> list[str]:
    if not runs:
        return []
    keys = dict.fromkeys(key for run in runs for key in run.config if key not in NOT_SETTINGS)
    differing = [key for key in keys if len({text_of(run.config.get(key)) for run in runs}) > 1]
    kinds = [distance_kind(run.config, run.quality) for run in runs]
    titles = _titles(kinds)
    bounds = ["test_bpd"]
    if any(is_number(run.summary.get("validation_bpd")) for run in runs):
        bounds.insert(0, "validation_bpd")
    rows = []
    for run, kind in zip(runs, kinds, strict=True):
        summary, path, distance = run.summary, f"{run.name}/{run_page}", numbers.distance(run.quality)
        settings = [run.config.get(key) for key in differing]
        link = Markup('<a href="{}">{}</a>').format(urllib.parse.quote(path), run.name)
        rows.append(
            [
                (link if contents.has(path) else run.name) + _note(summary),
                *(with_error(summary.get(name), summary.get(f"{name}_stderr")) for name in bounds),
                *(number(distance.value if kind == other else None, ".4g") for other in titles),
                *(number(summary.get(f"{part}_bpd")) for part in ("test_decoder", "test_kl", "train")),
                *(number(value, "") if is_number(value) else text_of(value) for value in settings),
            ]
        )
    named = {"validation_bpd": "validation bits/dim", "test_bpd": "test bits/dim"}
    head = ["run", *(named[name] for name in bounds), *titles.values(), "decoder", "KL", "train", *differing]
    caption = (
        "Bits/dim ± the standard error over images, the parts of the test bits/dim, the bits/dim of training images, "
        "and the config keys that differ. Click a heading to sort."
    )
    return [parts.table(head, rows, caption, sortable=True)]


def _note(summary: dict[str, Any]) -> str:
    """The remark after the name of a run."""
    if "stopped_early" in summary:
        return f" (stopped early at step {text_of(summary.get('step'))})"
    return "" if summary else " (not finished)"


def _tables(contents: Contents) -> list[str]:
    """The CSV files of the sweep as tables."""
    made = []
    for name in contents.matching("*.csv"):
        lines = list(csv.reader(io.StringIO(contents.text(name))))
        lines = [line for line in lines if len(line) == len(lines[0])]
        if len(lines) > 1:
            head, body = _with_half_widths(*lines)
            caption = name if len(head) == len(lines[0]) else f"{name}: {INTERVALS}"
            made.append(parts.table(head, body, caption, sortable=True))
    return made


def _with_half_widths(head: list[str], *body: list[str]) -> tuple[list[str], list[list[str]]]:
    """The columns, with each NAME_half_width as the ± of the column NAME."""
    halves = {name: head.index(name + HALF_WIDTH) for name in head if name + HALF_WIDTH in head}
    shown = [i for i in range(len(head)) if i not in halves.values()]
    cells = []
    for line in body:
        errors = {head.index(name): line[i] for name, i in halves.items()}
        cells.append([_cell(line[i], errors.get(i, "")) for i in shown])
    return [head[i] for i in shown], cells


def _float(text: str | None) -> float:
    """A cell of a CSV file as a number; NaN if it is not a number."""
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def _cell(text: str, half_width: str = "") -> str:
    """A cell of a CSV file: numbers are formatted, with the half-width of the interval if there is one."""
    value, error = _float(text), _float(half_width)
    if not is_number(value):
        return text or UNKNOWN
    if is_number(error):
        return with_error(value, error, "#.4g" if abs(value) >= 10 else ".4f")
    return number(int(value), ",") if value.is_integer() else number(value, "#.5g")
