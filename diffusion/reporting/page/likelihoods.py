"""Tables of the likelihoods other than the bound."""

from typing import Any, NamedTuple

from diffusion.reporting.page import parts
from diffusion.reporting.page.contents import Contents
from diffusion.reporting.page.parts import UNKNOWN, text_of, with_error

SPLITS = ("test", "validation", "train")
OF_RUN = "the run's summary"


class Column(NamedTuple):
    """A column about the test images: its heading, the name of its entry after KIND_, and its format."""

    heading: str
    entry: str
    form: str = ".4f"


class Kind(NamedTuple):
    """A likelihood: the entry of its value after KIND_, the caption of its table, and further columns."""

    entry: str
    caption: str
    columns: tuple[Column, ...]
    about: tuple[str, ...]  # entries of the protocol


KINDS = {
    "importance": Kind(
        "bpd",
        "Importance-weighted bound in bits/dim of pixel values, means over images ± standard error. Its expectation "
        "lies between the bound and the likelihood. The effective sample size is the equivalent number of equally "
        "weighted trajectories.",
        (
            Column("the bound (one trajectory)", "one_sample_bpd"),
            Column("gain over the bound, paired by image", "gain_bpd"),
            Column("error from the trajectories", "bpd_sampling_stderr"),
            Column("effective sample size", "ess", ".1f"),
            Column("its minimum", "ess_min", ".1f"),
        ),
        ("estimator", "name", "variance"),
    ),
    "ode": Kind(
        "density_bpd",
        "Density of the probability-flow ODE in bits/dim of dequantized pixel values, means over images ± standard "
        "error. The bound is of other data and another model, so the two cannot be compared.",
        (
            Column("error from the probes", "density_bpd_probes_stderr"),
            Column("change with ten times the tolerance", "density_bpd_solver_error", ".2g"),
            Column("steps of the solver", "steps", ".1f"),
        ),
        ("dequantization", "divergence", "tolerance", "x0_clipped"),
    ),
}


def is_of_another(entry: str) -> bool:
    """Whether an entry of summary.json, such as test_importance_bpd, belongs to one of KINDS."""
    return any(entry.startswith(f"{split}_{kind}_") for split in SPLITS for kind in KINDS)


def tables(contents: Contents, summary: dict[str, Any]) -> list[str]:
    """A table for each measured likelihood, with a row for the run's summary and for each evaluation."""
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
    """A row: the likelihood of each split, further numbers of the test images, and the protocol."""

    def value(split: str, entry: str, form: str = ".4f") -> str:
        found = f"{split}_{name}_{entry}"
        return with_error(scores.get(found), scores.get(f"{found}_stderr"), form)

    of_splits = [value(split, kind.entry) for split in SPLITS]
    more = [value("test", column.entry, column.form) for column in kind.columns]
    return [title, *of_splits, *more, *(text_of(protocol.get(entry, UNKNOWN)) for entry in kind.about)]
