"""Likelihoods besides the bound as tables of their own: none is a row of the bound's."""

from typing import Any, NamedTuple

from diffusion.reporting.page import parts
from diffusion.reporting.page.contents import Contents
from diffusion.reporting.page.parts import UNKNOWN, text_of, with_error

SPLITS = ("test", "validation", "train")
OF_RUN = "the run's summary"


class Column(NamedTuple):
    """A column about the test images: its heading, the entry after KIND_, and how it is printed."""

    heading: str
    entry: str
    form: str = ".4f"


class Kind(NamedTuple):
    """A likelihood: the entry after KIND_ that is its number, what it is of, and what else is shown of it."""

    entry: str
    caption: str
    columns: tuple[Column, ...]
    about: tuple[str, ...]  # entries of the protocol


KINDS = {
    "importance": Kind(
        "bpd",
        "Importance-weighted bound in bits/dim of pixel values, means over images ± standard error. Its expectation "
        "lies between the bound and the likelihood. The effective sample size says how many equal weights they are "
        "worth.",
        (
            Column("one trajectory: the bound", "one_sample_bpd"),
            Column("saved, paired by image", "gain_bpd"),
            Column("error from the trajectories", "bpd_sampling_stderr"),
            Column("effective sample size", "ess", ".1f"),
            Column("the least", "ess_min", ".1f"),
        ),
        ("estimator", "name", "variance"),
    ),
    "ode": Kind(
        "density_bpd",
        "Density by the probability-flow ODE in bits/dim of dequantized pixel values, means over images ± standard "
        "error. It is of other data and another model than the bound: the two cannot be compared.",
        (
            Column("error from the probes", "density_bpd_probes_stderr"),
            Column("change with ten times the tolerance", "density_bpd_solver_error", ".2g"),
            Column("steps of the solver", "steps", ".1f"),
        ),
        ("dequantization", "divergence", "tolerance", "x0_clipped"),
    ),
}


def is_of_another(entry: str) -> bool:
    """Whether an entry of summary.json belongs to one of KINDS, such as test_importance_bpd."""
    return any(entry.startswith(f"{split}_{kind}_") for split in SPLITS for kind in KINDS)


def tables(contents: Contents, summary: dict[str, Any]) -> list[str]:
    """A table for each likelihood that was measured, with a row for the run's summary and for each evaluation."""
    made = []
    for name, kind in KINDS.items():
        own = summary.get(f"{name}_protocol")
        rows = [_row(OF_RUN, name, kind, summary, own)] if isinstance(own, dict) else []
        for file in contents.matching(f"evaluations/*/{name}.json"):
            scores = contents.json(file)
            protocol = scores.get("protocol")
            rows.append(_row(file.split("/")[1], name, kind, scores, protocol if isinstance(protocol, dict) else {}))
        head = ["evaluation", *SPLITS, *(column.heading for column in kind.columns), *kind.about]
        made += [parts.table(head, rows, kind.caption, sortable=True)] if rows else []
    return made


def _row(title: str, name: str, kind: Kind, scores: dict[str, Any], protocol: dict[str, Any]) -> list[str]:
    """A row: the likelihood of each split, more of the test images, and how it was measured."""

    def value(split: str, entry: str, form: str = ".4f") -> str:
        found = f"{split}_{name}_{entry}"
        return with_error(scores.get(found), scores.get(f"{found}_stderr"), form)

    of_splits = [value(split, kind.entry) for split in SPLITS]
    more = [value("test", column.entry, column.form) for column in kind.columns]
    return [title, *of_splits, *more, *(text_of(protocol.get(entry, UNKNOWN)) for entry in kind.about)]
