"""The bound of networks that are too small for the data: the part of `experiments.bound_tightness` about capacity.

The data are a 2-D mixture with a known E[x_0 | x_t]. Multilayer perceptrons of growing width learn it from fresh
samples. Their gap is a quadrature over x_t. So is p_θ(x_0), which splits the gap into the model's error and looseness.
"""

import functools
import itertools
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
from diffusion.schedules import Schedule
from experiments import intervals, tables, tightness_plane
from experiments.intervals import Interval

ANGLES = np.arange(8) * np.pi / 4
CENTRES = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=-1)
VAR = 0.01
RING = Mixture(
    jnp.full(8, 1 / 8), jnp.asarray(CENTRES.reshape(8, 1, 1, 2), jnp.float32), jnp.full((8, 1, 1, 2), VAR)
)
PLANE = tightness_plane.Plane(np.full(8, 1 / 8), CENTRES, np.tile(VAR * np.eye(2), (8, 1, 1)))
SCHEDULE = schedules.cosine(50)
P = reverse.make("v", "fixed_large")
WIDTHS, SEEDS = (4, 8, 16, 32, 64), (0, 1, 2)
NUM_STEPS, BATCH_SIZE, LEARNING_RATE = 3000, 256, 3e-3
# The grid of the quadratures. Its spacing is 0.045; the smallest σ_t is 0.034, and the data's is 0.1.
REACH, POINTS = 4.5, 201
MASS_ERROR = 1e-3


class Perceptron(nn.Module):
    """v̂ from x_t and the time embedding, through three hidden layers."""

    width: int

    @nn.compact
    def __call__(self, x_t: Float[Array, "b 1 1 2"], network_t: Float[Array, " b"]) -> Float[Array, "b 1 1 2"]:
        h = jnp.concatenate([x_t.reshape(-1, 2), time_embedding(network_t, 16)], axis=-1)
        for _ in range(3):
            h = nn.swish(nn.Dense(self.width)(h))
        return nn.Dense(2)(h).reshape(-1, 1, 1, 2)


@functools.partial(jax.jit, static_argnames="network")
def train(network: Perceptron, seed: Array) -> Any:
    """Parameters trained by the bound itself, with t spread evenly over each batch."""
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, NUM_STEPS))
    params = network.init(jax.random.key(seed), jnp.zeros((1, 1, 1, 2)), jnp.zeros(1))
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
        gradient = jax.grad(loss)(params, jax.random.fold_in(jax.random.key(seed + 1), i))
        with jax.numpy_dtype_promotion("standard"):  # Optax multiplies its integer counts with floats
            updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(params, updates), moments), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(NUM_STEPS))
    return params


@jax.jit
def step_back(
    denoise: Denoise, row: Schedule, x: Float[Array, "n 2"], density: Float[Array, "p p"]
) -> tuple[Float[Array, "n 2"], Float[Array, "p p"]]:
    """E[x_{t−1} | x_t] under p_θ on the grid, and the density of x_{t−1} given the density of x_t."""
    x_t = x.reshape(-1, 1, 1, 2)
    output = denoise(x_t, jnp.full(len(x), row.network_t))
    g, _ = jax.vmap(lambda x_t, output: P(row, x_t, output, clip_x0=False))(x_t, output)
    mean, var = g.mean.reshape(-1, 2), jnp.exp(g.log_var.ravel()[0])
    line = x[: len(density), 1]
    kernel = jnp.exp(-0.5 * (line[:, None, None] - mean[None]) ** 2 / var) / jnp.sqrt(2 * jnp.pi * var)
    area = (line[1] - line[0]) ** 2
    weighted = kernel[..., 0] * (area * density.ravel())[None]
    return mean, jnp.matmul(weighted, kernel[..., 1].T, precision="highest")


def split(denoise: Denoise, x: Float[np.ndarray, "n 2"], steps: list[tightness_plane.Step]) -> dict[str, float]:
    """The part of the gap from the network's mean, and KL(q(x_0) ‖ p_θ(x_0)), in nats, by quadrature.

    Args:
        denoise: the network.
        x, steps: a grid, and the steps of q on it.

    Raises:
        ArithmeticError: p_θ has mass outside the grid.
    """
    grid = jnp.asarray(x, jnp.float32)
    density = jnp.exp(-0.5 * jnp.sum(grid**2, axis=1)).reshape(POINTS, POINTS) / (2 * jnp.pi)
    added = 0.0
    for t, step in reversed(list(enumerate(steps, start=1))):
        mean, density = step_back(denoise, SCHEDULE[t], grid, density)
        error = np.sum((np.asarray(mean, np.float64) - step.mean) ** 2, axis=1)
        added += float(step.density @ error) / (2 * (step.beta if t > 1 else steps[1].beta_tilde))
    model, area = np.asarray(density, np.float64).ravel(), tightness_plane.area(x)
    mass = model.sum() * area
    if abs(mass - 1) > MASS_ERROR:
        raise ArithmeticError(f"p_θ(x_0) has the mass {mass:.6f} on the grid, not 1")
    data = tightness_plane.joint(PLANE, x).sum(axis=0)
    log_ratio = np.log(np.maximum(data, 1e-300)) - np.log(np.maximum(model, 1e-300))
    return {"mean_error": added, "model_error": float(data @ log_ratio) * area}


def rows() -> list[dict[str, Any]]:
    """The gap and its terms: one row for the exact mean, whose width is None, and one per width and seed."""
    x = tightness_plane.grid(REACH, POINTS)
    steps = list(tightness_plane.steps(PLANE, SCHEDULE, x))
    floor = tightness_plane.gaps(PLANE, SCHEDULE, x)["beta"]

    def row(denoise: Denoise, **names: int | None) -> dict[str, Any]:
        numbers = split(denoise, x, steps)
        return {**names, "gap": floor + numbers["mean_error"], **numbers}

    exact = jax.tree_util.Partial(RING.denoiser(P, SCHEDULE))
    result = [row(exact, width=None, num_params=None, seed=None)]
    for width in WIDTHS:
        network = Perceptron(width)
        for seed in SEEDS:
            params = train(network, jnp.int32(seed))
            size = sum(leaf.size for leaf in jax.tree.leaves(params))
            denoise = jax.tree_util.Partial(network.apply, params)
            result.append(row(denoise, width=width, num_params=size, seed=seed))
    return result


def by_width(found: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Interval]]]:
    """Per width, its first row, and the intervals over seeds of the gap, its two terms and the mean's part."""
    result = []
    for _, group in itertools.groupby(found, key=lambda row: row["width"]):
        of_seed = list(group)
        numbers = {name: [row[name] for row in of_seed] for name in ("gap", "model_error", "mean_error")}
        numbers["looseness"] = [row["gap"] - row["model_error"] for row in of_seed]
        result.append((of_seed[0], {name: intervals.of_mean(values) for name, values in numbers.items()}))
    return result


def table(found: list[dict[str, Any]]) -> str:
    """Per width, the gap, its two terms, and its part from the network's mean."""
    cells = []
    for row, numbers in by_width(found):
        name = "exact mean" if row["width"] is None else f"3 layers of {row['width']}"
        terms = [intervals.text(numbers[key], 3) for key in ("gap", "model_error", "looseness", "mean_error")]
        cells.append([name, str(row["num_params"] or "–"), *terms])
    head = ["network", "parameters", "bound − H", "KL(q(x_0) ‖ p_θ(x_0))", "looseness", "part from the network's mean"]
    caption = intervals.caption([len(SEEDS)])
    note = f"2-D mixture of 8 Gaussians, cosine schedule, T = 50, variance β, nats, by quadrature; {caption}:\n\n"
    return note + tables.markdown(head, cells)


def plot(path: Path, found: list[dict[str, Any]]) -> None:
    """Plots the gap and its two terms against the number of parameters, a point per seed; dashed: the exact mean."""
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel="parameters of the network", ylabel="nats", xscale="log", yscale="log")
    (_, exact), *networks = by_width(found)
    size = [row["num_params"] for row, _ in networks]
    labels = {"gap": "bound − H", "model_error": r"KL(q($x_0$) ‖ $p_\theta$($x_0$)): error", "looseness": "looseness"}
    for colour, (name, label) in zip(("black", "C3", "C0"), labels.items(), strict=True):
        axes.plot(size, [numbers[name].mean for _, numbers in networks], color=colour, label=label)
        axes.axhline(exact[name].mean, color=colour, linestyle="--", linewidth=0.8)
        for row in found[1:]:
            value = row["gap"] - row["model_error"] if name == "looseness" else row[name]
            axes.plot(row["num_params"], value, "o", color=colour, markersize=3)
    axes.set_title("2-D mixture of 8 Gaussians, cosine, T = 50, variance β; dashed: exact mean", fontsize=9)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)
