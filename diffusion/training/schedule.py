"""The schedule in training: rows with a gradient, and the bound's terms that depend on no drawn t."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Key, PyTree, Real

from diffusion import continuous_time, learned_schedule, likelihood
from diffusion.learned_schedule import Inner
from diffusion.runtime import randomness
from diffusion.schedules import Row, Schedule

Losses = tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]


class TrainedSchedule(NamedTuple):
    """The forward process, fixed or learned, as functions made once by `make`.

    of_params: params -> the schedule, which depends on them if it is learned.
    at_rows: (losses_at, params, t [B]) -> losses_at(params, the rows of t), with the gradient to a learned schedule.
    extra_terms: (params, keys [B], x0 [B, H, W, C], number of pixel values) -> the terms of the bound that depend on no
        drawn t, in bits/dim [B].
    times: which t are drawn, one of `timesteps.TIMES`.
    """

    of_params: Callable[[PyTree], Schedule]
    at_rows: Callable[[Callable[[PyTree, Row], Losses], PyTree, Real[Array, " b"]], Losses]
    extra_terms: Callable[[PyTree, Key[Array, " b"], Array, int], dict[str, Float[Array, " b"]]]
    times: str


def make(
    of_params: Callable[[PyTree], Schedule], inner: Inner | None = None, times: str = "every_term"
) -> TrainedSchedule:
    """The schedule for a training run.

    A learned schedule is also trained by the prior's term of the bound, which no network can change.

    Args:
        of_params: params -> the schedule.
        inner: None for a fixed schedule; otherwise how it is trained: see `learned_schedule.losses`.
        times: which t are drawn, one of `timesteps.TIMES`. Only "every_term" draws the decoder's term. With the others
            the term is computed for every example.
    """

    def at_rows(losses_at: Callable, params: PyTree, t: Real[Array, " b"]) -> Losses:
        def rows_of(params: PyTree) -> Row:
            return continuous_time.rows(of_params(params), t)

        if inner is None:
            return losses_at(params, rows_of(params))
        return learned_schedule.losses(losses_at, params, rows_of, inner)

    def extra_terms(
        params: PyTree, keys: Key[Array, " b"], x0: Float[Array, "b h w c"], num_levels: int
    ) -> dict[str, Float[Array, " b"]]:
        schedule = of_params(params if inner is None else learned_schedule.with_fixed_inner(params))
        terms = {}
        if inner is not None:
            terms["prior_bpd"] = jax.vmap(lambda image: likelihood.prior_bpd(schedule, image))(x0)
        if times != "every_term":
            terms["decoder_bpd"] = _decoder_bpd(schedule[1], keys, x0, num_levels)
        return terms

    return TrainedSchedule(of_params, at_rows, extra_terms, times)


def _decoder_bpd(
    row: Schedule, keys: Key[Array, " b"], x0: Float[Array, "b h w c"], num_levels: int
) -> Float[Array, " b"]:
    """The decoder's term of each example, with its own noise. Only the decoder "bayes" needs no network for it."""

    def one(key: Key[Array, ""], image: Array) -> Array:
        eps = jax.random.normal(randomness.decoder_noise(key), image.shape)
        return likelihood.bayes_decoder_bpd(row, image, eps, num_levels)

    return jax.vmap(one)(keys, x0)
