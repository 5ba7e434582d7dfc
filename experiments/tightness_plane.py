"""The gap of 2-D mixtures by quadrature: the part of `experiments.bound_tightness` about a diagonal covariance.

Noise adds the same variance to both dimensions, and q(x_{t−1} | x_t) keeps an off-diagonal part of order β_t that a
diagonal covariance cannot express. All numbers are in nats and float64.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from diffusion import schedules
from diffusion.schedules import Schedule
from experiments import tables

REACH, POINTS = 7.5, 251  # of the grid of x_t in each dimension
NUM_STEPS = (25, 50, 100, 200, 400)
COVARIANCES = {
    "constant": "one σ* per t",
    "diagonal": "diagonal, exact for each $x_t$",
    "full": "full, exact for each $x_t$",
}


class Plane(NamedTuple):
    """Σ_k w_k N(mean_k, cov_k) in two dimensions."""

    weight: Float[np.ndarray, " k"]
    mean: Float[np.ndarray, "k 2"]
    cov: Float[np.ndarray, "k 2 2"]


CORRELATED = Plane(
    np.array([0.4, 0.6]),
    np.array([[-0.8, -0.5], [0.7, 0.6]]),
    np.array([[[0.25, 0.18], [0.18, 0.25]], [[0.16, -0.08], [-0.08, 0.25]]]),
)


class Step(NamedTuple):
    """One step of q at each point of the grid of x_t."""

    density: Float[np.ndarray, " n"]  # q(x_t) times the area of a point
    mean: Float[np.ndarray, "n 2"]  # E[x_{t−1} | x_t]
    cov: Float[np.ndarray, "3 n"]  # Cov(x_{t−1} | x_t): both variances, and the covariance
    beta: float
    beta_tilde: float  # 0 at t = 1


def grid(reach: float = REACH, points: int = POINTS) -> Float[np.ndarray, "n 2"]:
    """A square grid of x_t, row by row."""
    line = np.linspace(-reach, reach, points)
    return np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2)


def joint(data: Plane, x: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "k n"]:
    """w_k N(x; mean_k, cov_k)."""
    away = x.T[None] - data.mean[:, :, None]  # [k, 2, n]
    square = (away * (np.linalg.inv(data.cov) @ away)).sum(axis=1)
    scale = data.weight / (2 * np.pi * np.sqrt(np.linalg.det(data.cov)))
    return scale[:, None] * np.exp(-0.5 * square)


def steps(data: Plane, schedule: Schedule, x: Float[np.ndarray, "n 2"]) -> Iterator[Step]:
    """The steps t = 1…T, from log α alone."""
    log_alpha = np.asarray(schedule.log_alpha, np.float64)[1:]
    ends = np.cumsum(log_alpha)
    for end, before, of_step in zip(ends, np.concatenate([[0.0], ends[:-1]]), log_alpha, strict=True):
        beta, alpha_bar, noise = -np.expm1(of_step), np.exp(end), -np.expm1(end)
        total = alpha_bar * data.cov + noise * np.eye(2)
        diffused = Plane(data.weight, np.sqrt(alpha_bar) * data.mean, total)
        parts = joint(diffused, x)
        density = parts.sum(axis=0)
        share = parts / np.maximum(density, 1e-300)
        gain = data.cov @ np.linalg.inv(total)
        away = x.T[None] - diffused.mean[:, :, None]
        means = data.mean[:, :, None] + np.sqrt(alpha_bar) * (gain @ away)  # [k, 2, n]: E[x_0 | x_t, k]
        x0 = (share[:, None] * means).sum(axis=0)
        spread = means - x0[None]
        x0_cov = [
            (share * (noise * gain[:, i, j, None] + spread[:, i] * spread[:, j])).sum(axis=0)
            for i, j in ((0, 0), (1, 1), (0, 1))
        ]
        of_x0, of_x_t = np.exp(0.5 * before) * beta / noise, np.exp(0.5 * of_step) * -np.expm1(before) / noise
        beta_tilde = beta * -np.expm1(before) / noise
        cov = np.array([[beta_tilde], [beta_tilde], [0.0]]) + of_x0**2 * np.stack(x0_cov)
        yield Step(density * area(x), (of_x0 * x0).T + of_x_t * x, cov, beta, beta_tilde)


def area(x: Float[np.ndarray, "n 2"]) -> float:
    """The area per grid point."""
    return float(x[1, 1] - x[0, 1]) ** 2


def entropy(data: Plane, x: Float[np.ndarray, "n 2"]) -> float:
    """H(q(x_0))."""
    density = joint(data, x).sum(axis=0)
    return float(-np.sum(density * np.log(np.maximum(density, 1e-300))) * area(x))


def gaps(data: Plane, schedule: Schedule, x: Float[np.ndarray, "n 2"]) -> dict[str, float]:
    """KL(q(x_{0:T}) ‖ p(x_{0:T})) with the exact mean, by p's covariance; "beta" has Ho et al.'s β_t, and β̃_2 at t = 1.

    It is the cross entropy of p minus the entropy of q, which is H(q(x_0)) plus the entropy of T steps of noise.
    """
    found = list(steps(data, schedule, x))
    last = found[-1].density
    end = 0.5 * last @ (x**2).sum(axis=1) + math.log(2 * math.pi)  # −E log N(x_T; 0, I)
    less = end - entropy(data, x) - sum(math.log(2 * math.pi * step.beta) + 1 for step in found)
    totals = dict.fromkeys([*COVARIANCES, "beta"], less)
    for t, step in enumerate(found, start=1):
        one, other, between = step.cov
        average = float(step.density @ (one + other)) / 2
        beta = step.beta if t > 1 else found[1].beta_tilde
        logs = {
            "constant": 2 * math.log(average),
            # The determinant may be 0 where the density is 0.
            "diagonal": step.density @ np.log(np.maximum(one * other, 1e-300)),
            "full": step.density @ np.log(np.maximum(one * other - between**2, 1e-300)),
            "beta": 2 * (math.log(beta) + average / beta - 1),
        }
        for name, log_det in logs.items():
            totals[name] += 0.5 * float(log_det) + math.log(2 * math.pi) + 1
    return totals


def rows() -> list[dict[str, Any]]:
    """The gap of the correlated mixture against T, cosine schedule."""
    x = grid()
    return [{"num_steps": t, **gaps(CORRELATED, schedules.cosine(t), x)} for t in NUM_STEPS]


def table(found: list[dict[str, Any]]) -> str:
    """The gap times T, by covariance."""
    cells = [[str(row["num_steps"]), *(f"{row['num_steps'] * row[name]:.4f}" for name in COVARIANCES)] for row in found]
    head = ["T", "one σ* per t", "diagonal", "full"]
    return "Correlated 2-D mixture, cosine schedule, exact mean, gap × T in nats:\n\n" + tables.markdown(head, cells)


def plot(path: Path, found: list[dict[str, Any]]) -> None:
    """The gap against T, and the gap times T."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    gap, scaled = figure.subplots(1, 2)
    num_steps = np.array([row["num_steps"] for row in found])
    for name, label in COVARIANCES.items():
        value = np.array([row[name] for row in found])
        gap.loglog(num_steps, value, "o-", markersize=4, label=label)
        scaled.semilogx(num_steps, num_steps * value, "o-", markersize=4, label=label)
    gap.set(ylabel="gap of the bound (nats)")
    scaled.set(ylabel="gap × T (nats)", ylim=(0, None))
    for axes in (gap, scaled):
        axes.set_xlabel("T")
        axes.set_xticks(num_steps, [str(t) for t in num_steps])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    gap.legend(title="p's covariance", fontsize="small")
    figure.savefig(path, dpi=120)
