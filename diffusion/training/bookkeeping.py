"""The train step's work besides learning: microbatches, the window of metrics, skipped updates, norms to log."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

Window = dict[str, Float[Array, ""]]  # sums of metrics over `count` steps; `skipped`, if there, over the whole run


def in_microbatches(
    fn: Callable[[PyTree], tuple[PyTree, Array]], batch: PyTree, count: int, unroll: bool
) -> tuple[PyTree, Array]:
    """`fn` of a batch, computed in `count` equal parts of it.

    Args:
        fn: a batch -> (means over it, values of each example [B]).
        batch: leaves [B, ...].
        count: the number of microbatches.
        unroll: whether to unroll the loop over them.
    """
    if count == 1:
        return fn(batch)

    def accumulate(total: PyTree, microbatch: PyTree):
        means, of_each = fn(microbatch)
        return jax.tree.map(jnp.add, total, means), of_each

    microbatches = jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), batch)
    like, _ = jax.eval_shape(fn, jax.tree.map(lambda leaf: leaf[0], microbatches))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    total, of_each = jax.lax.scan(accumulate, zeros, microbatches, unroll=unroll)
    return jax.tree.map(lambda leaf: leaf / count, total), of_each.reshape(-1)


def empty_window(names: list[str], counts_skipped: bool) -> Window:
    """The window before the first step, for metrics of these names."""
    return {name: jnp.zeros(()) for name in (*names, "count", *(["skipped"] if counts_skipped else []))}


def window_at(step: Int[Array, ""], window: Window, log_every: int) -> Window:
    """The window to which this step's metrics are added. It starts again from zero after each row of the log."""
    keep = jnp.where(step % log_every == 0, 0.0, 1.0)
    return {name: total if name == "skipped" else keep * total for name, total in window.items()}


def added(window: Window, metrics: Window) -> Window:
    """The window with a step's metrics."""
    of_step = metrics | {"count": 1.0, "skipped": 0.0}
    return {name: total + of_step[name] for name, total in window.items()}


def skipped(window: Window) -> Window:
    """The window with one more skipped step. The metrics of a skipped step are not in the sums."""
    return window | {"skipped": window["skipped"] + 1.0}


def unless_nonfinite(metrics: Window, state: PyTree, left_out: PyTree) -> PyTree:
    """The state with this update, or the one without it if one of the update's metrics is NaN or Inf."""
    is_finite = jnp.isfinite(jnp.stack(list(metrics.values()))).all()
    return jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), state, left_out)


def groups(params: PyTree) -> list[str]:
    """The names of the parameter groups: the network's modules."""
    return sorted(params)


def group_norms(tree: PyTree) -> Float[Array, " groups"]:
    """The Euclidean norm of each of the `groups` of parameters, or of their gradient."""
    return jnp.stack([optax.global_norm(tree[name]) for name in groups(tree)])
