"""Constructions that look like bounds but are not: `experiments.audit` must detect them."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion import gaussian, likelihood, reverse, schedules
from diffusion.gaussian import Gaussian
from diffusion.model import Model
from experiments import audit_quadrature
from experiments.audit_bounds import Row, row_of
from experiments.audit_quadrature import Bits, Variant
from experiments.audit_spaces import Space

NOISY = schedules.linear_gamma(8, gamma_min=0.0, gamma_max=7.0)  # its x_1 leaves much of x_0 undetermined
SHARE = 1e-3


def neighbours(space: Space, seen: Float[np.ndarray, "d d"]) -> Callable[..., Array]:
    """A decoder whose factor for pixel i is P(x_0,i | x_1, the clean x_0,j with seen[i, j]): exact, from the data.

    If each pixel sees only earlier pixels, the product is P(x_0 | x_1), a code. If two pixels see each other, it is not
    a code: neither can be decoded before the other. (The factors see x_1 as the decoder "bayes" does.)
    """
    images, log_probs = space.images, jnp.log(jnp.asarray(space.probs, jnp.float32))
    mask = jnp.asarray(seen, bool)[:, None, :]

    def decoder(g: Gaussian, x0: Array, num_levels: int) -> Array:
        of_pixel = -0.5 * (images[:, 0, 0] - g.mean[0]) ** 2 * jnp.exp(-g.log_var[0])
        log_joint = log_probs + of_pixel.sum(axis=-1)
        is_equal = jnp.abs(images[:, 0, 0] - x0[0]) < 1 / num_levels  # [n, d]
        agrees = jnp.all(is_equal[None] | ~mask, axis=-1)  # [d, n]: with the pixels that pixel i sees
        agrees_with_own = agrees & is_equal.T

        def log_sum(chosen: Array) -> Array:
            return jax.nn.logsumexp(jnp.where(chosen, log_joint[None], -jnp.inf), axis=-1)

        return (log_sum(agrees_with_own) - log_sum(agrees))[None]

    return decoder


def rounded_to_the_guess(g: Gaussian, x0: Array, num_levels: int) -> Array:
    """Scores the pixel value nearest to the decoder's mean instead of x_0."""
    half = (num_levels - 1) / 2
    guess = jnp.clip(jnp.round((g.mean + 1) * half), 0, num_levels - 1) / half - 1
    return gaussian.discretized_log_prob(g, guess, num_levels)


def clamped(g: Gaussian, x0: Array, num_levels: int) -> Array:
    """The log masses of the bins. Masses below SHARE are raised to it, and none is lowered."""
    return jnp.maximum(gaussian.discretized_log_prob(g, x0, num_levels), np.float32(np.log(SHARE)))


def _bits(model: Model, space: Space, decoder: Callable[..., Array] | None) -> Bits:
    of = audit_quadrature.whatever_p(model)
    found = audit_quadrature.bounds_bits(
        of, (Variant(model.p, decoder),), model.schedule, space.images, space.num_levels
    )
    return Bits(found.value[0], found.error[0])


def rows(space: Space) -> Iterator[Row]:
    """Every control, beside a bound that differs from it in one point."""
    if space.num_pixels > 1:
        every = np.ones((space.num_pixels, space.num_pixels))
        model = space.model("x0", "learned", "bayes", NOISY)
        causal = _bits(model, space, neighbours(space, np.tril(every, -1)))
        yield row_of("bound", "decoder sees clean pixels before its own", space, "exact", "T = 8", causal)
        circular = _bits(model, space, neighbours(space, every - np.eye(space.num_pixels)))
        yield row_of("control", "decoder sees clean neighbours on both sides", space, "exact", "T = 8", circular)
    model = space.model("x0", "learned", "network", NOISY)
    own = _bits(model, space, None)
    yield row_of("bound", "decoder of x_0", space, "exact", "T = 8", own)
    guess = _bits(model, space, rounded_to_the_guess)
    yield row_of("control", "x_0 rounded to the network's guess", space, "exact", "T = 8", guess)
    unclamped = _bits(_constant(space), space, None)
    yield row_of("bound", "decoder without a clamp", space, "constant", "T = 1", unclamped)
    raised = _bits(_constant(space), space, clamped)
    yield row_of("control", f"masses below {SHARE:g} raised to it", space, "constant", "T = 1", raised)
    total, error = decoder_mass(space, likelihood.PROTOCOLS["ho2020"].decoder)
    yield _of_masses("control", "ho2020's clamp at 1e-12, in float64", space, total, error)
    total, error = decoder_mass(space, gaussian.discretized_log_prob)
    yield _of_masses("bound", "the exact decoder, in float64", space, total, error)


def photographs() -> Iterator[Row]:
    """ho2020's clamp on one pixel of 256 levels."""
    space = Space(1, 256)
    total, error = decoder_mass(space, likelihood.PROTOCOLS["ho2020"].decoder)
    yield _of_masses("control", "ho2020's clamp at 1e-12, in float64", space, total, error)


def _of_masses(kind: str, what: str, space: Space, total: float, error: float) -> Row:
    return Row(kind, what, str(space), "constant", "σ = 0.01", total, error, None, 0.0, space.entropy_bits)


def _constant(space: Space) -> Model:
    """T = 1 and ᾱ_1 = 0: x_1 is independent of x_0, so the bound is the decoder's term, and its masses sum to 1."""
    p = reverse.make("x0", "learned")

    def denoise(x_t: Array, network_t: Array) -> Array:
        return jnp.concatenate([jnp.zeros_like(x_t), jnp.full_like(x_t, 2 * np.log(0.05))], axis=-1)

    return Model(denoise, p, schedules.harmonic(1), space.num_levels)


def decoder_mass(space: Space, decoder: Callable[..., Array], std: float = 0.01) -> tuple[float, float]:
    """The sum over all images of a decoder's mass, in float64, and its rounding error.

    The decoder is checked alone because the slack of the other terms would hide an excess of 1e-11.
    """
    with jax.enable_x64(True):
        levels = jnp.asarray(space.levels[:, 0, 0] / ((space.num_levels - 1) / 2) - 1, jnp.float64)
        g = Gaussian(jnp.zeros(space.num_pixels, jnp.float64), jnp.full(space.num_pixels, 2 * np.log(std), jnp.float64))
        masses = np.asarray(jnp.exp(jax.vmap(lambda x: decoder(g, x, space.num_levels))(levels).sum(axis=-1)))
    return float(masses.astype(np.longdouble).sum()), 1e-15 * space.num_levels
