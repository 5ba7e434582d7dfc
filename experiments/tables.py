"""Helpers for the tables of studies: means with their standard errors, Markdown and CSV."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float


def stderr(samples: Float[np.ndarray, " n"]) -> float:
    """The standard error of the mean of independent samples; NaN for one."""
    return float(samples.std(ddof=1) / len(samples) ** 0.5) if len(samples) > 1 else np.nan


def mean_and_stderr(samples: Float[np.ndarray, " n"]) -> tuple[float, float]:
    return float(samples.mean()), stderr(samples)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def save_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the rows, with every column that any row has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
