"""The bound of networks that are too small for the data: the part of `experiments.bound_tightness` about capacity.

A 2-D mixture of which E[x_0 | x_t] is known; multilayer perceptrons of growing width learn it from fresh samples.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from diffusion import likelihood, reverse, schedules
from diffusion.exact import oracles
from diffusion.exact.oracles import Mixture
from diffusion.networks.layers import time_embedding
from diffusion.reverse import Denoise
from experiments.tables import mean_and_stderr
from experiments.tightness_known import bound_nats

ANGLES = np.arange(8) * np.pi / 4
RING = Mixture(
    jnp.full(8, 1 / 8),
    jnp.asarray(np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=-1).reshape(8, 1, 1, 2), jnp.float32),
    jnp.full((8, 1, 1, 2), 0.01),
)
SCHEDULE = schedules.cosine(50)
P = reverse.make("v", "fixed_large")
WIDTHS = (4, 8, 16, 32, 64)
NUM_STEPS, BATCH_SIZE, LEARNING_RATE = 3000, 256, 3e-3
NUM_SCORED = 4096


class Perceptron(nn.Module):
    """v̂ from x_t and the time embedding, through three hidden layers."""

    width: int

    @nn.compact
    def __call__(self, x_t: Float[Array, "b 1 1 2"], network_t: Float[Array, " b"]) -> Float[Array, "b 1 1 2"]:
        h = jnp.concatenate([x_t.reshape(-1, 2), time_embedding(network_t, 16)], axis=-1)
        for _ in range(3):
            h = nn.swish(nn.Dense(self.width)(h))
        return nn.Dense(2)(h).reshape(-1, 1, 1, 2)


def train(network: Perceptron) -> Any:
    """Parameters that minimise the bound itself, t spread evenly over each batch."""
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, NUM_STEPS))
    params = network.init(jax.random.key(0), jnp.zeros((1, 1, 1, 2)), jnp.zeros(1))
    t = jnp.arange(BATCH_SIZE) % SCHEDULE.num_steps + 1
    measure = likelihood.term_and_x0_mse(P, clip_x0=False, decoder=oracles.continuous_decoder)

    def loss(params, key):
        x0 = jax.vmap(RING.sample)(jax.random.split(key, BATCH_SIZE))
        keys = jax.random.split(jax.random.fold_in(key, 1), BATCH_SIZE)
        denoise = functools.partial(network.apply, params)
        terms, _ = likelihood.at_one_t(denoise, SCHEDULE[t], x0, keys, measure)
        return terms.mean() * SCHEDULE.num_steps

    def step(state, i):
        params, moments = state
        gradient = jax.grad(loss)(params, jax.random.fold_in(jax.random.key(1), i))
        with jax.numpy_dtype_promotion("standard"):  # Optax multiplies its integer counts with floats
            updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(params, updates), moments), None

    @jax.jit
    def run(params):
        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(NUM_STEPS))
        return params

    return run(params)


def rows() -> list[dict[str, Any]]:
    """Per width: the bound's gap to the exact log p, and the part that a perfect mean would not have, in nats."""
    x0 = jax.vmap(RING.sample)(jax.random.split(jax.random.key(2), NUM_SCORED))
    keys = jax.random.split(jax.random.key(3), NUM_SCORED)
    log_prob = np.asarray(jax.vmap(RING.log_prob)(x0), np.float64)

    def bound(denoise: Denoise) -> np.ndarray:
        compiled = jax.jit(lambda x0, keys: bound_nats(denoise, P, SCHEDULE, x0, keys))
        return np.asarray(compiled(x0, keys), np.float64)

    exact = bound(RING.denoiser(P, SCHEDULE))
    result = [{"width": None, "num_params": None, "gap": mean_and_stderr(exact + log_prob), "mean_error": (0.0, 0.0)}]
    for width in WIDTHS:
        network = Perceptron(width)
        params = train(network)
        learned = bound(functools.partial(network.apply, params))
        result.append(
            {
                "width": width,
                "num_params": sum(leaf.size for leaf in jax.tree.leaves(params)),
                "gap": mean_and_stderr(learned + log_prob),
                "mean_error": mean_and_stderr(learned - exact),
            }
        )
    return result


def plot(path: Path, found: list[dict[str, Any]]) -> None:
    """The gap against the number of parameters, and the exact score's as the floor."""
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel="parameters of the network", ylabel="nats", xscale="log", yscale="log")
    exact, networks = found[0], found[1:]
    size = [row["num_params"] for row in networks]
    for name, label in (
        ("gap", "gap of the bound, bound − NLL"),
        ("mean_error", "what the network's mean adds"),
    ):
        value, stderr = np.array([row[name] for row in networks]).T
        axes.errorbar(size, value, 2 * stderr, fmt="o-", markersize=4, label=label)
    floor, stderr = exact["gap"]
    axes.axhline(floor, color="0.4", linestyle="--", label=f"gap with the exact score: {floor:.3f}")
    axes.axhspan(floor - 2 * stderr, floor + 2 * stderr, color="0.4", alpha=0.15)
    for row in networks:
        axes.annotate(
            f"width {row['width']}", (row["num_params"], row["gap"][0]), xytext=(4, 6),
            textcoords="offset points", fontsize=8,
        )  # fmt: skip
    axes.set_title("2-D mixture of 8 Gaussians, cosine, T = 50, variance β; bars: 2 standard errors", fontsize=9)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)
