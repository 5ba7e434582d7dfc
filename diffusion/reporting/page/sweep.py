"""The page of a sweep: its runs in a table with both numbers, what differs between them, tables and plots."""

import csv
import io
import urllib.parse
from typing import Any, NamedTuple

import numpy as np

from diffusion.reporting.page import layout, numbers
from diffusion.reporting.page.charts import Series, chart
from diffusion.reporting.page.contents import Contents
from diffusion.reporting.page.layout import Page
from diffusion.reporting.page.markup import (
    UNKNOWN,
    Markup,
    element,
    is_number,
    joined,
    number,
    table,
    text_of,
    with_error,
)
from diffusion.reporting.page.run import CONFIG, QUALITY, SUMMARY, flat

TABLE = "table.csv"  # a sweep's numbers, means over seeds
MAX_RUNS, MAX_COLUMNS, MAX_PLOTS = 500, 10, 8
NOT_SETTINGS = ("data.data_dir",)  # where the data lies on one machine


class RunFiles(NamedTuple):
    """A run of a sweep: the name of its folder, and what its files hold."""

    name: str
    config: dict[str, Any]
    summary: dict[str, Any]
    quality: dict[str, Any]


def runs(contents: Contents) -> list[str]:
    """The names of the folders that hold runs."""
    return [name.removesuffix(f"/{CONFIG}") for name in contents.matching(f"*/{CONFIG}")]


def page(contents: Contents, run_page: str) -> Page:
    """What the page of a sweep says; `run_page` is the name of its runs' pages, which it links to."""
    found = [
        RunFiles(
            name,
            flat(contents.json(f"{name}/{CONFIG}")),
            *(contents.json(f"{name}/{file}") for file in (SUMMARY, QUALITY)),
        )
        for name in runs(contents)[:MAX_RUNS]
    ]
    finished = [run for run in found if run.summary]
    data = sorted({text_of(run.config.get("data.name")) for run in found})
    sections = [
        ("runs", "Runs", _runs(contents, found, run_page)),
        ("tables", "Tables", _tables(contents)),
        ("plots", "Plots", _plots(contents, found)),
        ("report", "Report", [layout.raw("table.md", contents.text("table.md"))]),
    ]
    return Page(
        title=contents.directory.resolve().name,
        kicker=" · ".join(["sweep", *data]),
        lead=f"{len(finished)} of {len(runs(contents))} runs are finished" if found else "",
        cards=_cards(finished),
        notes=contents.problems,
        sections=sections,
    )


def _cards(finished: list[RunFiles]) -> dict[str, Markup]:
    """The best run by each number."""
    cards = {}
    scored = [run for run in finished if is_number(run.summary.get("test_bpd"))]
    if scored:
        best = min(scored, key=lambda run: run.summary["test_bpd"])
        bpd = with_error(best.summary["test_bpd"], best.summary.get("test_bpd_stderr"))
        cards[f"lowest bits/dim: {best.name}"] = bpd
    distances = [(run, distance) for run in finished if (distance := numbers.distance(run.quality))]
    if distances and len({distance.title for _, distance in distances}) == 1:
        best, distance = min(distances, key=lambda pair: pair[1].value)
        cards[f"lowest {distance.title}: {best.name}"] = number(distance.value, ".4g")
    return cards


def differing(found: list[RunFiles]) -> list[str]:
    """The config keys whose values differ between runs, in the order of the config."""
    keys = dict.fromkeys(key for run in found for key in run.config if key not in NOT_SETTINGS)
    return [key for key in keys if len({text_of(run.config.get(key)) for run in found}) > 1]


def _runs(contents: Contents, found: list[RunFiles], run_page: str) -> list[Markup]:
    if not found:
        return []
    keys = differing(found)
    distances = [numbers.distance(run.quality) for run in found]
    titles = list(dict.fromkeys(distance.title for distance in distances if distance))
    rows = []
    for run, distance in zip(found, distances, strict=True):
        summary, page_path = run.summary, f"{run.name}/{run_page}"
        link = element("a", run.name, href=urllib.parse.quote(page_path)) if contents.has(page_path) else run.name
        unfinished = "" if summary else element("span", " not finished", class_="quiet")
        rows.append(
            [
                joined([link, unfinished]),
                with_error(summary.get("test_bpd"), summary.get("test_bpd_stderr")),
                *(number(distance and distance.title == title and distance.value, ".4g") for title in titles),
                *(number(summary.get(f"{part}_bpd")) for part in ("test_decoder", "test_kl", "train")),
                *(_setting(run.config.get(key)) for key in keys[:MAX_COLUMNS]),
            ]
        )
    head = ["run", "bits/dim", *titles, numbers.subscripts("L_0"), "KL", "train", *keys[:MAX_COLUMNS]]
    words = (
        "Bits/dim of the test images ± the standard error over images, its parts, the bits/dim of training images, and "
        "the config keys that differ. A click on a heading sorts."
    )
    parts = [element("p", words, class_="quiet"), table(head, rows, "Every run", sortable=True)]
    if keys[MAX_COLUMNS:]:
        parts.append(element("p", f"Further keys that differ: {', '.join(keys[MAX_COLUMNS:])}.", class_="quiet"))
    if len(runs(contents)) > len(found):
        parts.append(element("p", f"The first {MAX_RUNS} of {len(runs(contents))} runs.", class_="quiet"))
    return parts


def _setting(value: Any) -> str:
    return element("data", text_of(value), value=repr(value)) if is_number(value) else text_of(value)


def _tables(contents: Contents) -> list[Markup]:
    """The tables that the sweep's program wrote, unrounded where it did not round."""
    parts = []
    for name in contents.matching("*.csv"):
        lines = list(csv.reader(io.StringIO(contents.text(name))))
        lines = [line for line in lines if len(line) == len(lines[0])][: MAX_RUNS + 1]
        if len(lines) > 1:
            head, *body = lines
            parts.append(table(head, [[_cell(text) for text in line] for line in body], name, sortable=True))
    return parts


def _cell(text: str) -> str:
    """A cell of a CSV file, as a number if it is one."""
    try:
        value = float(text)
    except ValueError:
        return text or UNKNOWN
    if not is_number(value):
        return text
    return number(int(value), ",") if value.is_integer() else number(value, "#.5g")


def _plots(contents: Contents, found: list[RunFiles]) -> list[Markup]:
    """One number against the other, and the plots that the sweep's program left."""
    both = [
        (run.summary["test_bpd"], distance)
        for run in found
        if is_number(run.summary.get("test_bpd")) and (distance := numbers.distance(run.quality))
    ]
    charts = []
    for title in dict.fromkeys(distance.title for _, distance in both):
        bpd, value = np.array([(bpd, distance.value) for bpd, distance in both if distance.title == title]).T
        charts.append(chart(f"{title} against bits/dim", "bits/dim (test)", title, [Series("", bpd, value, 1, "dots")]))
    parts = [element("div", *charts, class_="charts")] if charts else []
    names = contents.matching("*.png")[:MAX_PLOTS]
    return parts + [made for name in names if (made := layout.plot(contents, name, f"The plot {name}", name))]
