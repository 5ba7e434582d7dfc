"""The choice of the best checkpoint: by the loss of validation images, which no step has seen."""

import logging
from pathlib import Path

VAL_LOSS = "val_loss"  # the metric by which checkpoints are ranked
TEST_LOSS = "test_loss"  # ... and by which version 0.3 and earlier ranked them


def score(metrics: dict[str, float]) -> float:
    """The loss that ranks a checkpoint with these metrics. It is infinite if the checkpoint was not scored."""
    return metrics.get(VAL_LOSS, metrics.get(TEST_LOSS, float("inf")))


def best_step(metrics: dict[int, dict[str, float]], directory: Path) -> int:
    """The step of the lowest loss; of equal losses, the latest.

    A run of an earlier version is ranked by the loss of test images, with a warning.

    Args:
        metrics: the metrics of each checkpoint, by step.
        directory: the run's directory, for messages.

    Raises:
        ValueError: no checkpoint was scored.
    """
    for name in (VAL_LOSS, TEST_LOSS):
        if losses := {step: row[name] for step, row in metrics.items() if name in row}:
            break
    else:
        raise ValueError(
            f"nothing unseen ranks the checkpoints of {directory}: data.validation is 0, or none is scored yet; "
            "take --checkpoint=latest or a step"
        )
    if name == TEST_LOSS:
        logging.warning("the checkpoints of %s are ranked by test images, as an earlier version did it", directory)
    return min(losses, key=lambda step: (losses[step], -step))
