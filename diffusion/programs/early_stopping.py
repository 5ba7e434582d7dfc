"""Early stopping: training ends after train.patience consecutive validations without a lower val_loss.

The decision depends only on metrics.jsonl up to the step, so a killed and resumed run stops at the same step. A fork
counts its own validations.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from diffusion.experiment.workdir import STOPPED_EARLY
from diffusion.programs import fork
from diffusion.reporting.metrics_log import read_metrics
from diffusion.runtime import processes
from diffusion.runtime.ranking import VAL_LOSS


class Stop(NamedTuple):
    """The reason why training stopped, as in summary.json."""

    validations: int  # in a row without a lower val_loss; the last one is of the step where training stopped
    lowest_val_loss: float
    lowest_at_step: int


def check(config: ConfigDict, num_validation: int) -> None:
    """Raises a ValueError if a patience is set and there is no validation image, as with a tenth of very few."""
    if config.train.patience and not num_validation:
        raise ValueError(
            f"train.patience={config.train.patience} follows val_loss, and data.validation={config.data.validation} "
            f"sets none of the images of data.name={config.data.name!r} aside"
        )


def rule(config: ConfigDict, directory: Path) -> Callable[[int], bool]:
    """(step) -> whether training ends after it, on every process: process 0 reads its metrics.jsonl."""

    def is_over(step: int) -> bool:
        if not config.train.patience:
            return False
        stop = processes.on_first(lambda: at(config, directory, step))
        return processes.bool_from_first(stop is not None)

    return is_over


def at(config: ConfigDict, directory: Path, step: int) -> Stop | None:
    """The reason why training stops after `step`; None if it goes on, or if this is the last step anyway."""
    begin = fork.origin_of(directory).get("step", 0)
    rows = [row for row in read_metrics(directory) if VAL_LOSS in row and begin < row["step"] <= step]
    losses = {row["step"]: row[VAL_LOSS] for row in rows}
    if not config.train.patience or step not in losses or step >= config.train.num_steps:
        return None
    lowest_at = min(losses, key=losses.get)  # the first of equals
    validations = sum(validated > lowest_at for validated in losses)
    return Stop(validations, losses[lowest_at], lowest_at) if validations >= config.train.patience else None


def of_summary(config: ConfigDict, directory: Path, step: int) -> dict[str, Any]:
    """The entry of summary.json."""
    stop = at(config, directory, step)
    return {STOPPED_EARLY: stop._asdict()} if stop else {}
