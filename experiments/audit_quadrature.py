"""The bound of an image without sampling: each term's expectation over its x_t, and the integral over time.

A term of the bound depends on one x_t alone, x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε, so its expectation is an integral over ε.
It has as many dimensions as an image, here at most three. The trapezoidal rule on a grid of ε is used; for smooth
integrands its error falls exponentially with the spacing. The result is the mean over two grids that are shifted by
half a spacing from each other. Half their difference is stated as the error, which is far above the true error where
the integrand is smooth.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion import continuous_time, likelihood, process
from diffusion.gaussian import Gaussian
from diffusion.likelihood import Measure
from diffusion.model import Model
from diffusion.reverse import Denoise, Reverse
from diffusion.schedules import Schedule

# Points and spacing of the grid of ε in every dimension, by the number of dimensions.
GRIDS = {1: (129, 0.1), 2: (21, 0.6), 3: (9, 1.25)}
# Points with less weight are left out: in three dimensions a third of them, 3e-8 of the weight and 1e-6 of E ‖ε‖².
LEAST_WEIGHT = 1e-9
INTERVALS, GAUSS_LEGENDRE = 10, 4  # intervals from γ_1 to γ_T, and instants in each
FLOAT32_BITS = 2e-5  # the possible float32 rounding error of the sum of all terms
# These programs run for a second or two, but compilation takes ten times as long.
QUICKLY_COMPILED = {"xla_backend_optimization_level": 1}


class Bits(NamedTuple):
    """Bits of every image, for all its dimensions together, and their possible error."""

    value: Float[np.ndarray, "*bounds n"]
    error: Float[np.ndarray, "*bounds n"]


class Rule(NamedTuple):
    """E f(ε) ≈ Σ weight f(eps) for ε ~ N(0, I)."""

    eps: Float[Array, "points 1 1 d"]
    weight: Float[Array, " points"]


def rules(num_pixels: int) -> tuple[Rule, Rule]:
    """The two grids."""
    points, spacing = GRIDS[num_pixels]
    found = []
    for shift in (-0.25, 0.25):
        line = (np.arange(points) - (points - 1) / 2 + shift) * spacing
        eps = np.stack(np.meshgrid(*[line] * num_pixels, indexing="ij"), axis=-1).reshape(-1, 1, 1, num_pixels)
        weight = np.exp(-0.5 * (eps**2).sum(axis=(1, 2, 3)))
        weight /= weight.sum()
        counts = weight > LEAST_WEIGHT
        found.append(Rule(*(jnp.asarray(table[counts], jnp.float32) for table in (eps, weight))))
    return tuple(found)


class Variant(NamedTuple):
    """A bound to compute: the reverse process, and a decoder instead of its own, if not None."""

    p: Reverse
    decoder: Callable[..., Array] | None = None


def bound_bits(
    model: Model, x0: Float[Array, "n 1 1 d"], decoder: Callable[..., Array] | None = None, clip_x0: bool = True
) -> Float[np.ndarray, " n"]:
    """The bound of each image under a model, in bits: the expectation of `likelihood.vlb_term_bpd`, summed over t.

    Args:
        model: of images [1, 1, d] with d ≤ 3.
        x0: in [-1, 1].
        decoder: (Gaussian, x0, num_levels) -> log mass of each element, in nats; None for the model's own.
        clip_x0: clip x̂_0 to [-1, 1].
    """

    variants = (Variant(model.p, decoder),)
    return bounds_bits(whatever_p(model), variants, model.schedule, x0, model.num_levels, clip_x0).value[0]


def whatever_p(model: Model) -> Callable[[Reverse], Denoise]:
    """The model's own network for every reverse process, for `bounds_bits`."""
    return jax.tree_util.Partial(_own, model.denoise)


def _own(denoise: Denoise, p: Reverse) -> Denoise:
    return denoise


def bounds_bits(
    denoise_of: Callable[[Reverse], Denoise],
    variants: Sequence[Variant],
    schedule: Schedule,
    x0: Float[Array, "n 1 1 d"],
    num_levels: int,
    clip_x0: bool = True,
) -> Bits:
    """The bound of each image under several reverse processes of one network, in one program.

    Args:
        denoise_of: reverse process -> its network, a `jax.tree_util.Partial`.
    """
    of = functools.partial(_terms_bits, variants=tuple(variants), num_levels=num_levels, clip_x0=clip_x0)
    found = [of(denoise_of, schedule, x0, rule) for rule in rules(x0.shape[-1])]
    return _both(*(np.asarray(terms, np.float64).sum(axis=0) for terms in found))


@functools.partial(
    jax.jit, static_argnames=("variants", "num_levels", "clip_x0"), compiler_options=QUICKLY_COMPILED
)
def _terms_bits(denoise_of, schedule, x0, rule, variants, num_levels, clip_x0) -> Float[Array, "terms bounds n"]:
    prior = jax.vmap(functools.partial(likelihood.prior_bpd, schedule))(x0)

    def of_row(row: Schedule, chosen: Sequence[Variant]) -> Array:
        def of(p: Reverse, decoder: Callable[..., Array] | None) -> Array:
            measure = functools.partial(_term, p, decoder, num_levels, clip_x0)
            return _expectation(denoise_of(p), row, x0, rule, measure)

        return jnp.stack([of(*variant) for variant in chosen])

    # The decoder is used only at t = 1, and takes long to compile.
    silent = list(dict.fromkeys(Variant(p, _no_decoder) for p, _ in variants))
    later = jax.lax.map(lambda row: of_row(row, silent), schedule[2:])
    later = later[:, np.asarray([silent.index(Variant(p, _no_decoder)) for p, _ in variants])]
    first = of_row(schedule[1], variants)[None]
    return x0[0].size * jnp.concatenate([jnp.broadcast_to(prior[None, None], first.shape), first, later])


def _no_decoder(g: Gaussian, x0: Array, num_levels: int) -> Array:
    return jnp.full_like(x0, jnp.nan)


def _term(p, decoder, num_levels, clip_x0, row, x0, x_t, eps, output) -> Array:
    return likelihood.vlb_term_bpd(p, row, x0, x_t, output, num_levels, clip_x0, decoder)


def _expectation(denoise: Denoise, row: Schedule, x0: Array, rule: Rule, measure: Measure) -> Float[Array, "n *k"]:
    """The expectation over ε of a measure (one or more numbers), for each image."""

    def at_each_eps(image: Array) -> Array:
        return jax.vmap(lambda eps: process.q_sample(row, image, eps))(rule.eps)

    x_t = jax.vmap(at_each_eps)(x0)
    flat = x_t.reshape(-1, *x0.shape[1:])
    output = denoise(flat, jnp.full(len(flat), row.network_t))
    of_eps = jax.vmap(measure, in_axes=(None, None, 0, 0, 0))
    values = jax.vmap(of_eps, in_axes=(None, 0, 0, None, 0))(
        row, x0, x_t, rule.eps, output.reshape(*x_t.shape[:-1], output.shape[-1])
    )
    return jnp.moveaxis(values, 1, -1) @ rule.weight


def continuous_bits(
    model: Model, x0: Float[Array, "n 1 1 d"], measure: Callable[..., Array], at_end: Callable[..., Array]
) -> Bits:
    """Bounds for T → ∞: integrals over the instants of a schedule (`continuous_time.at`).

    By Gauss–Legendre in γ: the loss per unit of γ is a smooth function of γ for every schedule.

    Args:
        model: its `denoise` accepts any network_t, also between two steps.
        x0: in [-1, 1].
        measure: (model, row of an instant, x0, x_t, eps, output) -> several losses per unit of t, in bits/dim.
        at_end: the same arguments at t = 1 -> the remaining terms of each bound.
    """
    gamma = -np.asarray(model.schedule.log_snr, np.float64)[1:]
    ends = np.linspace(gamma[0], gamma[-1], INTERVALS + 1)
    found = []
    for count in (GAUSS_LEGENDRE, GAUSS_LEGENDRE - 1):
        where, weight = np.polynomial.legendre.leggauss(count)
        spare = GAUSS_LEGENDRE - count  # points of zero weight, so that one program serves both rules
        where, weight = np.pad(where, (0, spare)), np.pad(weight, (0, spare))
        points = (ends[:-1, None] + (where + 1) / 2 * np.diff(ends)[:, None]).ravel()
        t = np.interp(points, gamma, np.arange(1, len(gamma) + 1))
        slope = np.diff(gamma)[np.ceil(t).astype(int).clip(2, len(gamma)) - 2]
        weights = np.tile(weight / 2, INTERVALS) * (ends[1] - ends[0]) / slope
        t, weights = jnp.asarray(t, jnp.float32), jnp.asarray(weights, jnp.float32)
        for rule in rules(x0.shape[-1])[: count - GAUSS_LEGENDRE + 2]:
            bits = _continuous(model, x0, rule, t, weights, measure, at_end)
            found.append(np.asarray(bits, np.float64).sum(axis=0).T)
    fine, shifted, coarse = found
    both = _both(fine, shifted)
    return Bits(both.value, both.error + np.abs(fine - coarse))


@functools.partial(jax.jit, static_argnames=("measure", "at_end"), compiler_options=QUICKLY_COMPILED)
def _continuous(model, x0, rule, t, weights, measure, at_end) -> Float[Array, "terms n bounds"]:
    def of_instant(instant: tuple[Array, Array]) -> Array:
        row = continuous_time.at(model.schedule, instant[0])
        loss = functools.partial(measure, model)
        return instant[1] * _expectation(model.denoise, row, x0, rule, loss)

    ends = _expectation(model.denoise, model.schedule[1], x0, rule, functools.partial(at_end, model))
    return x0[0].size * jnp.concatenate([ends[None], jax.lax.map(of_instant, (t, weights))])


def _both(one: np.ndarray, other: np.ndarray) -> Bits:
    return Bits((one + other) / 2, np.abs(one - other) / 2 + FLOAT32_BITS)


def mass(bits: Bits) -> tuple[float, float]:
    """Σ 2^−bits, and its error."""
    each = np.exp2(-bits.value)
    return float(each.sum()), float((each * math.log(2) * bits.error).sum())
