"""What training carries from one step to the next; a checkpoint is exactly this."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree


@flax.struct.dataclass
class TrainState:
    """One replica's state. Randomness and data order follow from (seed, step) and are not part of it.

    `window` sums the metrics since the last row of metrics.jsonl, so that a run that was stopped in between
    writes the same row as one that was not. Its entry `skipped`, if there is one, counts over the whole run.
    """

    step: Any  # int32 []: optimizer steps taken. (Leaves may be arrays, NumPy arrays or their shapes.)
    params: PyTree
    ema_params: PyTree  # an exponential moving average of params
    opt_state: Any
    timesteps: PyTree  # what the draw of t remembers: see `timesteps.TimestepSampler`
    window: dict[str, Any]  # float32 []: sums over `count` steps


def create(
    params: PyTree, optimizer: optax.GradientTransformation, timesteps: PyTree, metric_names: tuple[str, ...]
) -> TrainState:
    """The state before the first step. The EMA starts as a copy of the parameters, so it needs no debiasing."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        timesteps=timesteps,
        window={name: jnp.zeros(()) for name in (*metric_names, "count")},
    )
