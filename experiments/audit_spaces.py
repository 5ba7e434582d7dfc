"""Spaces of images that can be enumerated, and networks for them: the part of `experiments.audit` that makes models.

An image is [1, 1, d], d numbers. Every network here returns (E[x_0 | x_t], Var(x_0 | x_t)) as a function of x_t and log
SNR, so one network serves every schedule, prediction and variance.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8

from diffusion import likelihood, reverse, schedules
from diffusion.exact import oracles
from diffusion.exact.oracles import Mixture
from diffusion.model import Model
from diffusion.reverse import Denoise, Reverse
from diffusion.schedules import Schedule

WIDTH, NUM_STEPS, BATCH_SIZE = 48, 1000, 256
SHARPEST = 1e-4  # the smallest variance of x_0 for a decoder: with a width of 0, other values would have no mass
# x_t, log SNR -> E[x_0 | x_t] and Var(x_0 | x_t) of each element, or a network's estimates of them.
Moments = Any


@dataclasses.dataclass(frozen=True)
class Space:
    """All images of `num_pixels` numbers with `num_levels` values each, and a distribution over them.

    The distribution is not uniform, and neighbours are correlated, so a bound that sees a neighbour gains from it.
    """

    num_pixels: int
    num_levels: int

    def __str__(self) -> str:
        return f"{self.num_pixels} × {self.num_levels}"

    @functools.cached_property
    def levels(self) -> UInt8[np.ndarray, "n 1 1 d"]:
        """Every image, as pixel values."""
        every = itertools.product(range(self.num_levels), repeat=self.num_pixels)
        return np.asarray(list(every), np.uint8).reshape(-1, 1, 1, self.num_pixels)

    @functools.cached_property
    def images(self) -> Float[Array, "n 1 1 d"]:
        """Every image, in [-1, 1]."""
        return jnp.asarray(self.levels / ((self.num_levels - 1) / 2) - 1, jnp.float32)

    @functools.cached_property
    def probs(self) -> Float[np.ndarray, " n"]:
        """The data's probability of every image."""
        x = np.asarray(self.images, np.float64)[:, 0, 0]
        logits = np.random.RandomState(0).normal(size=len(x)) - 4 * (np.diff(x, axis=1) ** 2).sum(axis=1)
        return np.exp(logits) / np.exp(logits).sum()

    @property
    def entropy_bits(self) -> float:
        """The entropy of the data."""
        return float(-(self.probs * np.log2(self.probs)).sum())

    def exact(self) -> Moments:
        """The moments of x_0 under the data."""
        return of_mixture(self.probs, self.images)

    def model(self, prediction: str, variance: str, decoder: str, schedule: Schedule) -> Model:
        """The model with the exact denoiser and the reverse process of these names."""
        p = reverse.make(prediction, variance, decoder)
        return Model(denoiser(self.exact(), p, schedule), p, schedule, self.num_levels)


SPACES = (Space(2, 8), Space(1, 17), Space(3, 4))


def of_mixture(probs: Float[np.ndarray, " n"], images: Float[Array, "n 1 1 d"]) -> Moments:
    """The moments under a distribution over images: a mixture of Gaussians with zero variance."""
    points = Mixture(jnp.asarray(probs, jnp.float32), images, jnp.zeros_like(images))
    return jax.tree_util.Partial(_posterior, points)


def _posterior(points: Mixture, x_t: Array, log_snr: Array) -> tuple[Array, Array]:
    return points.posterior(log_snr, x_t)


def alike(exact: Moments, networks: dict[str, Moments]) -> dict[str, Moments]:
    """`exact` and some perceptrons as one function with different arguments, so that one program serves all."""

    def either(is_exact: bool, network: Moments) -> Moments:
        return jax.tree_util.Partial(_either, jnp.asarray(is_exact), exact, network)

    found = {"exact": either(True, next(iter(networks.values())))}
    return found | {name: either(False, network) for name, network in networks.items()}


def _either(is_exact: Array, exact: Moments, network: Moments, x_t: Array, log_snr: Array) -> tuple[Array, Array]:
    return jax.lax.cond(is_exact, exact, network, x_t, log_snr)


def denoiser(moments: Moments, p: Reverse, schedule: Schedule) -> Denoise:
    """The moments as a network for `p`: its prediction, and its variance if `p` learns one.

    The variance "learned_range" is limited to the range from β̃_t to β_t.
    """
    return jax.tree_util.Partial(_Denoise(p), moments, schedule)


@dataclasses.dataclass(frozen=True)
class _Denoise:
    """The function behind `denoiser`. Two are equal if their `p` is, so that a program is compiled only once."""

    p: Reverse

    def __call__(self, moments: Moments, schedule: Schedule, x_t: Array, network_t: Array) -> Array:
        rows = schedule[jnp.searchsorted(schedule.network_t, network_t)]
        return jax.vmap(functools.partial(self._one, moments))(rows, x_t)

    def _one(self, moments: Moments, row: Schedule, x_t: Array) -> Array:
        x0, x0_var = moments(x_t, row.log_snr)
        output = self.p.target(row, x0, x_t, (x_t - row.sqrt_alpha_bar * x0) / row.sqrt_one_minus_alpha_bar)
        if not self.p.learns_variance:
            return output
        log_var = oracles.reverse_log_var(row, jnp.where(row.t == 1, jnp.maximum(x0_var, SHARPEST), x0_var))
        if self.p.variance == "learned_range":
            width = jnp.maximum(row.log_beta - row.log_beta_tilde, 1e-6)
            log_var = jnp.clip(2 * (log_var - row.log_beta_tilde) / width - 1, -1.0, 1.0)
        return jnp.concatenate([output, log_var], axis=-1)


def instants(moments: Moments, schedule: Schedule) -> Denoise:
    """E[x_0 | x_t] for any network_t, also between two steps, where γ_t and network_t are both linear in t."""
    return jax.tree_util.Partial(_at_instants, moments, schedule)


def _at_instants(moments: Moments, schedule: Schedule, x_t: Array, network_t: Array) -> Array:
    log_snr = jnp.interp(network_t, schedule.network_t[1:], schedule.log_snr[1:])
    return jax.vmap(moments)(x_t, log_snr)[0]


def random_network(num_pixels: int, scale: float = 1.0) -> Moments:
    """An untrained perceptron with outputs of order `scale`."""
    sizes = (num_pixels + 3, WIDTH, WIDTH, 2 * num_pixels)
    keys = jax.random.split(jax.random.key(num_pixels), len(sizes) - 1)
    layers = []
    for key, n, m in zip(keys, sizes, sizes[1:], strict=False):
        layers.append((jax.random.normal(key, (n, m)) * (2 / n) ** 0.5, jnp.zeros(m)))
    layers[-1] = (layers[-1][0] * scale, layers[-1][1])
    return jax.tree_util.Partial(_perceptron, layers)


def _perceptron(layers: list, x_t: Array, log_snr: Array) -> tuple[Array, Array]:
    """x̂_0 = √ᾱ x_t − √(1 − ᾱ) v̂, and a variance that is a multiple of 1 − ᾱ."""
    level = jnp.clip(log_snr, -8.0, 8.0) / 4
    h = jnp.concatenate([x_t.ravel(), jnp.stack([level, jnp.sin(2 * level), jnp.cos(2 * level)])])
    for matrix, bias in layers[:-1]:
        h = jax.nn.swish(h @ matrix + bias)
    v, raw = jnp.split((h @ layers[-1][0] + layers[-1][1]).reshape(*x_t.shape[:-1], -1), 2, axis=-1)
    signal, noise = jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))
    return signal * x_t - noise * v, noise**2 * jnp.exp(jnp.clip(raw, -8.0, 4.0))


def trained_network(space: Space, num_steps: int = NUM_STEPS) -> Moments:
    """The perceptron after a few seconds of training with the bound, on all noise levels."""
    schedule, p = schedules.linear_gamma(100, gamma_min=-7.0), reverse.make("x0", "learned")
    start = random_network(space.num_pixels)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, num_steps))
    measure = likelihood.term_and_x0_mse(p, space.num_levels, clip_x0=False)
    logits = jnp.log(jnp.asarray(space.probs, jnp.float32))

    def loss(moments: Moments, key: Array) -> Array:
        x0 = space.images[jax.random.categorical(key, logits, shape=(BATCH_SIZE,))]
        t = jax.random.randint(jax.random.fold_in(key, 1), (BATCH_SIZE,), 1, schedule.num_steps + 1)
        keys = jax.random.split(jax.random.fold_in(key, 2), BATCH_SIZE)
        terms, _ = likelihood.at_one_t(denoiser(moments, p, schedule), schedule[t], x0, keys, measure)
        return terms.mean()

    def step(state: tuple, i: Array) -> tuple:
        moments, statistics = state
        gradient = jax.grad(loss)(moments, jax.random.fold_in(jax.random.key(0), i))
        with jax.numpy_dtype_promotion("standard"):  # Optax multiplies its integer counts with floats
            updates, statistics = optimizer.update(gradient, statistics)
        return (optax.apply_updates(moments, updates), statistics), None

    @jax.jit
    def run(moments: Moments) -> Moments:
        return jax.lax.scan(step, (moments, optimizer.init(moments)), jnp.arange(num_steps))[0][0]

    return run(start)
