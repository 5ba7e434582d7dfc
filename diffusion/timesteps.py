"""How training draws t: which term of the bound each example of a batch estimates.

Each sampler draws for the whole global batch, so the numbers do not depend on how devices share it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

HISTORY_LENGTH = 10  # losses per t; Nichol & Dhariwal (2021), section 3.3
UNIFORM_SHARE = 0.001  # of the draws; their program's
TICKETS = 2**30


def uniform(key: Key[Array, ""], batch_size: int, num_steps: int) -> Int[Array, " b"]:
    """t ~ Uniform{1…T}, independently for each example. Ho et al. (2020), algorithm 1."""
    return jax.random.randint(key, (batch_size,), 1, num_steps + 1)


def low_discrepancy(key: Key[Array, ""], batch_size: int, num_steps: int) -> Int[Array, " b"]:
    """Evenly spaced t with one random offset: each t is uniform, and the batch's mean loss varies less.

    Source: Kingma et al. (2021, VDM), appendix I.1.
    """
    u = (jax.random.uniform(key) + jnp.arange(batch_size) / batch_size) % 1.0
    return jnp.minimum((u * num_steps).astype(jnp.int32) + 1, num_steps)


class History(NamedTuple):
    """The last losses of every t; row t − 1 is that of t."""

    losses: Float[Array, "steps length"]  # a ring: the n-th loss of a t (from 0) is at n % length
    counts: Int[Array, " steps"]  # how many losses a t has had so far


def empty_history(num_steps: int) -> History:
    """No losses yet."""
    return History(jnp.zeros((num_steps, HISTORY_LENGTH)), jnp.zeros(num_steps, jnp.int32))


def loss_aware(
    history: History, key: Key[Array, ""], batch_size: int, num_steps: int
) -> tuple[Int[Array, " b"], Float[Array, " b"]]:
    """t with probability p_t ∝ √E[L_t²] and the weight 1/(T p_t), which keeps the weighted loss's mean unbiased.

    Nichol & Dhariwal (2021), eq. 18. The mean is over the last 10 losses of t; the draw is uniform until every t
    has 10, and mixed with 0.001 uniform after that, so that no t is forgotten.
    """
    rms = jnp.sqrt(jnp.mean(history.losses**2, axis=1))
    is_full = jnp.all(history.counts >= HISTORY_LENGTH)
    p = jnp.where(is_full, (1 - UNIFORM_SHARE) * rms / rms.sum() + UNIFORM_SHARE / num_steps, 1 / num_steps)
    # A lottery in whole numbers: the probabilities that are drawn from are exactly those that are divided by. A
    # float32 sum of p would be off by as much as the rarest t has.
    tickets = jnp.maximum(jnp.round(p * TICKETS).astype(jnp.int32), 1)
    sums = jnp.cumsum(tickets)
    drawn = jax.random.randint(key, (batch_size,), 0, sums[-1])
    index = jnp.searchsorted(sums, drawn, side="right")
    weight = sums[-1].astype(jnp.float32) / (num_steps * tickets[index].astype(jnp.float32))
    return index.astype(jnp.int32) + 1, weight


def record(history: History, t: Int[Array, " b"], losses: Float[Array, " b"]) -> History:
    """The history after a batch's unweighted losses, in the batch's order, however often a t occurs in it."""
    num_steps, length = history.losses.shape
    batch_counts = jnp.zeros(num_steps, jnp.int32).at[t - 1].add(1)
    order = jnp.argsort(t, stable=True)
    sorted_t = t[order]
    occurrence = jnp.arange(len(t)) - jnp.searchsorted(sorted_t, sorted_t)  # 0, 1, … among those of equal t
    # Of more than `length` losses of one t only the last ones are written: two writes to one place have no order.
    is_kept = occurrence >= batch_counts[sorted_t - 1] - length
    row = jnp.where(is_kept, sorted_t - 1, num_steps)
    place = (history.counts[sorted_t - 1] + occurrence) % length
    written = history.losses.at[row, place].set(losses[order], mode="drop")
    return History(written, history.counts + batch_counts)


class TimestepSampler(NamedTuple):
    """A way to draw t, as pure functions of what it remembers.

    init: (T) -> the memory before the first step, an empty tuple where there is none.
    draw: (memory, key, batch size, T) -> t [B] and the weights [B] that make the mean of weight × loss unbiased
        for the mean over uniform t.
    update: (memory, t [B], unweighted losses [B]) -> the memory after the step.
    """

    init: Callable[[int], PyTree]
    draw: Callable[[PyTree, Key[Array, ""], int, int], tuple[Int[Array, " b"], Float[Array, " b"]]]
    update: Callable[[PyTree, Int[Array, " b"], Float[Array, " b"]], PyTree]


def _forgetful(draw: Callable[[Key[Array, ""], int, int], Int[Array, " b"]]) -> TimestepSampler:
    """A sampler of uniform t that remembers nothing."""

    def draw_unweighted(memory, key, batch_size, num_steps):
        return draw(key, batch_size, num_steps), jnp.ones(batch_size)

    return TimestepSampler(lambda num_steps: (), draw_unweighted, lambda memory, t, losses: memory)


SAMPLERS = {
    "uniform": _forgetful(uniform),
    "low_discrepancy": _forgetful(low_discrepancy),
    "loss_aware": TimestepSampler(empty_history, loss_aware, record),
}
