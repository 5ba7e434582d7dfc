"""The error about a train step whose loss or gradient is NaN or Inf."""

import numpy as np
from jaxtyping import Float, Int

LAST_GOOD = "the last checkpoint is from before this step"
Metrics = dict[str, np.ndarray]  # of a call: entries [steps, ...], as `parallel.train_steps` returns them


def check(unchecked: list[tuple[range, Metrics]], groups: list[str], skipped: int, allowed: int) -> None:
    """Raises a FloatingPointError about the first step that has a NaN or Inf.

    Args:
        unchecked: steps that were not checked yet, and their metrics.
        groups: the names of the parameter groups, in the order of `group_norms`.
        skipped: the number of updates skipped so far.
        allowed: the number that may be skipped: train.skip_nonfinite.
    """
    if allowed and skipped <= allowed:
        return
    for steps, metrics in unchecked:
        for i, step in enumerate(steps):
            numbers = {name: values[i] for name, values in metrics.items() if values.ndim == 1}
            bad = ", ".join(f"{name} = {value}" for name, value in numbers.items() if not np.isfinite(value))
            if bad:
                budget = f"{skipped} updates were left out, train.skip_nonfinite={allowed}; " if allowed else ""
                raise FloatingPointError(
                    f"step {step}: {bad}; {_examples(metrics['t'][i], metrics['losses'][i])}; "
                    f"norms of the parameters before step {steps[0]}: {_norms(groups, metrics['param_norms'][i])}; "
                    f"norms of the gradient: {_norms(groups, metrics['grad_norms'][i])}; {budget}{LAST_GOOD}"
                )


def _examples(t: Int[np.ndarray, " b"], losses: Float[np.ndarray, " b"]) -> str:
    is_bad = ~np.isfinite(losses)
    if is_bad.any():
        return f"the loss is NaN or Inf at t = {', '.join(map(str, np.unique(t[is_bad])))}"
    return f"every example's loss is finite, the largest is {losses.max():.3g} at t = {t[losses.argmax()]}"


def _norms(groups: list[str], norms: Float[np.ndarray, " groups"]) -> str:
    return ", ".join(f"{name} {norm:.3g}" for name, norm in zip(groups, norms, strict=True))
