"""The draw of t in training. It determines the term of the bound that each example of a batch estimates.

Each sampler draws for the whole global batch, so the numbers do not depend on how the devices split it.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, Real

from diffusion.schedules import Schedule

TICKETS = 2**30
INSTANTS = 2**23


class TimestepSampler(NamedTuple):
    """A way to draw t, as pure functions of a memory.

    init: (T) -> the memory before the first step; an empty tuple if the sampler has none.
    draw: (memory, key, batch size, T) -> t [B] and the weights [B] that make the mean of weight × loss unbiased for the
        mean over uniform t. The samplers in LOSS_SHAPING have the weights 1.
    update: (memory, t [B], unweighted losses [B]) -> the memory after the step.
    """

    init: Callable[[int], PyTree]
    draw: Callable[[PyTree, Key[Array, ""], int, int], tuple[Real[Array, " b"], Float[Array, " b"]]]
    update: Callable[[PyTree, Real[Array, " b"], Float[Array, " b"]], PyTree]


def uniform() -> TimestepSampler:
    """t ~ Uniform{1…T}, independently for each example. Ho et al. (2020), algorithm 1."""
    return _without_memory(lambda key, batch_size, num_steps: jax.random.randint(key, (batch_size,), 1, num_steps + 1))


def low_discrepancy(at_1: float = 0.0) -> TimestepSampler:
    """Evenly spaced t with one random offset. Each t is uniform, and the batch's mean loss varies less.

    Source: Kingma et al. (2021, VDM), appendix I.1.

    Args:
        at_1: if not 0, this share of a batch is at t = 1, and the rest at t = 2…T, if the batch has fewer examples than
            steps. In the bound t = 1 is the decoder's term, which can be as large as hundreds of KL terms. Without a
            share it is absent from most batches and dominates the others. The weights keep the mean over a batch
            unbiased: t = 1 counts as one step of T.
    """
    if not 0 <= at_1 <= 0.9:
        raise ValueError(f"objective.timesteps: low_discrepancy's at_1={at_1} must be in [0, 0.9]")

    def evenly(key, count, num_steps):
        u = (jax.random.uniform(key) + jnp.arange(count) / count) % 1.0
        return jnp.minimum((u * num_steps).astype(jnp.int32) + 1, num_steps)

    def draw(memory, key, batch_size, num_steps):
        first = int(at_1 * batch_size)
        if not first or num_steps <= batch_size:
            return evenly(key, batch_size, num_steps), jnp.ones(batch_size)
        rest = batch_size - first
        t = jnp.concatenate([jnp.ones(first, jnp.int32), 1 + evenly(key, rest, num_steps - 1)])
        weights = np.repeat([1 / first, (num_steps - 1) / rest], [first, rest]) * batch_size / num_steps
        return t, jnp.asarray(weights, jnp.float32)

    return TimestepSampler(lambda num_steps: (), draw, lambda memory, t, losses: memory)


def _without_memory(draw: Callable[[Key[Array, ""], int, int], Int[Array, " b"]]) -> TimestepSampler:
    def draw_unweighted(memory, key, batch_size, num_steps):
        return draw(key, batch_size, num_steps), jnp.ones(batch_size)

    return TimestepSampler(lambda num_steps: (), draw_unweighted, lambda memory, t, losses: memory)


def log_normal(schedule: Schedule, mean: float = -1.2, std: float = 1.2) -> TimestepSampler:
    """The step whose σ_t = 1/√SNR_t is nearest to a draw of ln σ ~ N(mean, std²). Karras et al. (2022, EDM), table 1.

    No weight corrects for the draw. As in that paper, the frequency of a noise level is part of the loss.

    Raises:
        ValueError: std ≤ 0.
    """
    _check_std(std, "log_normal")
    log_sigma = -0.5 * schedule.log_snr[1:]
    between = 0.5 * (log_sigma[1:] + log_sigma[:-1])

    def draw(key, batch_size, num_steps):
        drawn = mean + std * jax.random.normal(key, (batch_size,))
        return jnp.searchsorted(between, drawn).astype(jnp.int32) + 1

    return _without_memory(draw)


def logit_normal(mean: float = 0.0, std: float = 1.0) -> TimestepSampler:
    """t/T = s with logit s ~ N(mean, std²). Esser et al. (2024, Stable Diffusion 3), section 3.1.

    No weight corrects for the draw, as in `log_normal`. On the linear path, `schedules.rectified_flow`, both samplers
    are the same, because ln σ_t is logit s there.

    Raises:
        ValueError: std ≤ 0.
    """
    _check_std(std, "logit_normal")

    def draw(key, batch_size, num_steps):
        s = jax.nn.sigmoid(mean + std * jax.random.normal(key, (batch_size,)))
        return jnp.minimum((s * num_steps).astype(jnp.int32) + 1, num_steps)

    return _without_memory(draw)


def _check_std(std: float, name: str) -> None:
    if std <= 0:
        raise ValueError(f"objective.timesteps: std={std} of {name} must be above 0")


def loss_aware(history_length: int = 10, uniform_share: float = 0.001) -> TimestepSampler:
    """t with probability p_t ∝ √E[L_t²] and the weight 1/(T p_t), which keeps the mean of the weighted loss unbiased.

    Nichol & Dhariwal (2021), eq. 18 and section 3.3. The mean is over the last `history_length` losses of t. The draw
    is uniform until every t has that many losses. After that `uniform_share` of the draws stay uniform, so that no t is
    forgotten.

    Raises:
        ValueError: history_length < 1, or uniform_share outside (0, 1].
    """
    if history_length < 1:
        raise ValueError(f"objective.timesteps: history_length={history_length} of loss_aware must be at least 1")
    if not 0 < uniform_share <= 1:
        raise ValueError(f"objective.timesteps: uniform_share={uniform_share} of loss_aware must be in (0, 1]")

    def init(num_steps: int) -> History:
        return empty_history(num_steps, history_length)

    def draw(history, key, batch_size, num_steps):
        return draw_by_loss(history, key, batch_size, num_steps, uniform_share)

    return TimestepSampler(init, draw, record)


class History(NamedTuple):
    """The last losses of every t; row t − 1 belongs to t."""

    losses: Float[Array, "steps length"]  # a ring: the n-th loss of a t (from 0) is at n % length
    counts: Int[Array, " steps"]  # how many losses a t has had so far


def empty_history(num_steps: int, length: int) -> History:
    """No losses yet."""
    return History(jnp.zeros((num_steps, length)), jnp.zeros(num_steps, jnp.int32))


def draw_by_loss(
    history: History, key: Key[Array, ""], batch_size: int, num_steps: int, uniform_share: float
) -> tuple[Int[Array, " b"], Float[Array, " b"]]:
    """The draw of `loss_aware`: t and its weights."""
    rms = jnp.sqrt(jnp.mean(history.losses**2, axis=1))
    is_full = jnp.all(history.counts >= history.losses.shape[1])
    p = jnp.where(is_full, (1 - uniform_share) * rms / rms.sum() + uniform_share / num_steps, 1 / num_steps)
    # A lottery in integers, so the draw has exactly the probabilities in the weights. A float32 sum of p would
    # have an error as large as the probability of the rarest t.
    tickets = jnp.maximum(jnp.round(p * TICKETS).astype(jnp.int32), 1)
    sums = jnp.cumsum(tickets)
    drawn = jax.random.randint(key, (batch_size,), 0, sums[-1])
    index = jnp.searchsorted(sums, drawn, side="right")
    weight = sums[-1].astype(jnp.float32) / (num_steps * tickets[index].astype(jnp.float32))
    return index.astype(jnp.int32) + 1, weight


def record(history: History, t: Int[Array, " b"], losses: Float[Array, " b"]) -> History:
    """The history with a batch's unweighted losses added in order. A t may occur repeatedly."""
    num_steps, length = history.losses.shape
    batch_counts = jnp.zeros(num_steps, jnp.int32).at[t - 1].add(1)
    order = jnp.argsort(t, stable=True)
    sorted_t = t[order]
    occurrence = jnp.arange(len(t)) - jnp.searchsorted(sorted_t, sorted_t)  # 0, 1, … among those of equal t
    # If one t has more than `length` losses, only the last ones are written: two writes to one place have no order.
    is_kept = occurrence >= batch_counts[sorted_t - 1] - length
    row = jnp.where(is_kept, sorted_t - 1, num_steps)
    place = (history.counts[sorted_t - 1] + occurrence) % length
    written = history.losses.at[row, place].set(losses[order], mode="drop")
    return History(written, history.counts + batch_counts)


def kl_terms(sampler: TimestepSampler) -> TimestepSampler:
    """Draws t = 2…T as `sampler` draws 1…T − 1. Every example then also gets the decoder's term, t = 1."""

    def draw(memory, key, batch_size, num_steps):
        t, weight = sampler.draw(memory, key, batch_size, num_steps - 1)
        return t + 1, weight

    return TimestepSampler(
        init=lambda num_steps: sampler.init(num_steps - 1),
        draw=draw,
        update=lambda memory, t, losses: sampler.update(memory, t - 1, losses),
    )


def continuous(sampler: TimestepSampler) -> TimestepSampler:
    """Draws real t in (1, T) as `sampler` draws INSTANTS integers. The sampler must have no memory.

    There are as many instants as float32 has numbers in [½, 1), because a float32 draw has no more values.
    """

    def draw(memory, key, batch_size, num_steps):
        number, weight = sampler.draw(memory, key, batch_size, INSTANTS)
        return 1.0 + (num_steps - 1) * ((number.astype(jnp.float32) - 0.5) / INSTANTS), weight

    return TimestepSampler(sampler.init, draw, sampler.update)


def every_term(sampler: TimestepSampler) -> TimestepSampler:
    """The sampler itself: t = 1…T, so the decoder's term is drawn as well."""
    return sampler


# The kinds of t to draw; see `objectives.TIMES`.
TIMES = {"every_term": every_term, "kl_terms": kl_terms, "continuous": continuous}
SAMPLERS = {
    "uniform": uniform,
    "low_discrepancy": low_discrepancy,
    "loss_aware": loss_aware,
    "log_normal": log_normal,
    "logit_normal": logit_normal,
}
# Samplers whose draw is meant to weight the loss. With them the mean of a bound's terms is not a bound.
LOSS_SHAPING = ("log_normal", "logit_normal")


def make(entry: Callable[..., TimestepSampler], schedule: Schedule, times: str) -> TimestepSampler:
    """The sampler made from an entry of SAMPLERS with bound arguments, for the t of TIMES[times]."""
    takes_schedule = "schedule" in inspect.signature(entry).parameters
    return TIMES[times](entry(schedule) if takes_schedule else entry())
