"""Checks that end a training: a NaN or Inf, and replica divergence."""

from collections.abc import Callable

import numpy as np

from diffusion.runtime import nonfinite
from diffusion.runtime.devices import Replicated
from diffusion.runtime.nonfinite import LAST_GOOD
from diffusion.training.plan import Plan


def finite(
    unchecked: list[tuple[range, Replicated]], names: list[str], window: dict[str, np.ndarray], allowed: int
) -> None:
    """Raises a FloatingPointError if the metrics since the last check have a NaN or Inf."""
    on_host = [(steps, metrics.host()) for steps, metrics in unchecked]
    nonfinite.check(on_host, names, skipped=int(window.get("skipped", 0)), allowed=allowed)


def replicas(
    plan: Plan, step: int, state: Replicated, differing_replicas: Callable[[Replicated], list[str]]
) -> None:
    """Raises a RuntimeError if a check is due at this step and the devices hold different states."""
    is_due = plan.check_replicas_every and step % plan.check_replicas_every == 0
    if is_due and (differing := differing_replicas(state)):
        raise RuntimeError(
            f"step {step}: the devices no longer hold the same state, {differing[0]} being the first of "
            f"{len(differing)} leaves that differ: a device may be faulty; {LAST_GOOD}"
        )
