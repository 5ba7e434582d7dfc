"""The EMA in a checkpoint, which evaluation, sampling and coding read, and its estimated optimal variance."""

import functools
from pathlib import Path
from typing import Any

import flax
import numpy as np
from jaxtyping import PyTree

from diffusion.runtime import files
from diffusion.runtime.digests import tree_sha256
from diffusion.training.step import TrainState
from diffusion.variances import X0Variance

X0_VARIANCE = "x0_variance.npz"  # the estimate that the optimal variance needs


@flax.struct.dataclass
class EmaState:
    """The part of a training state that evaluation, sampling and coding need. A checkpoint is not read beyond it."""

    step: Any  # int32 []: optimizer steps taken
    ema_params: PyTree

    @functools.cached_property
    def sha256(self) -> str:
        """The digest of the parameters, which identifies results."""
        return tree_sha256(self.ema_params)


def ema_of(state: TrainState) -> EmaState:
    return EmaState(state.step, state.ema_params)


def save_x0_variance(directory: Path, analytic: X0Variance, error: X0Variance, state: EmaState) -> None:
    """Writes x0_variance.npz: float32 [T + 1] tables of both estimates, and the digest of their weights."""
    with files.replacing(directory / X0_VARIANCE) as file:
        np.savez(
            file,
            analytic=analytic.mean,
            analytic_stderr=analytic.stderr,
            error=error.mean,
            error_stderr=error.stderr,
            step=state.step,
            ema_sha256=state.sha256,
        )


def load_x0_variance(directory: Path, state: EmaState) -> X0Variance:
    """The analytic estimate of these weights. An old file without a digest is matched by the step.

    Raises:
        FileNotFoundError: nothing was estimated yet.
        ValueError: the estimate belongs to other weights.
    """
    path = directory / X0_VARIANCE
    again = f"python -m experiments.variance_accounting --workdir={directory} writes it"
    if not path.exists():
        raise FileNotFoundError(f"the optimal variance needs {path}; {again}")
    try:
        with np.load(path) as file:
            saved = dict(file)
        found = X0Variance(saved["analytic"], saved["analytic_stderr"])
        step, ema_sha256 = int(saved["step"]), str(saved.get("ema_sha256", state.sha256))
    except (TypeError, *files.DAMAGE) as error:
        raise ValueError(f"{path} is damaged; {again}") from error
    if step != state.step or ema_sha256 != state.sha256:
        other = f"which are not those of this checkpoint, of step {state.step}"
        raise ValueError(f"{path} was estimated with the weights of step {step}, {other}; {again}")
    return found
