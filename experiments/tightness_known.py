"""The bound where log p(x_0) is known: the part of `experiments.bound_tightness` that needs no trained network.

Numbers are in nats, for all dimensions of an example together.
"""

import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from diffusion import likelihood, reverse, schedules
from diffusion.exact import oracles
from diffusion.schedules import Schedule
from experiments.tables import mean_and_stderr

GAUSSIAN = oracles.normal(jnp.asarray([[[0.3, -1.0]]]), jnp.asarray([[[0.2, 1.3]]]))
# Weights, means and variances [3, 1], in float64 for the quadratures.
LINE = tuple(np.asarray([numbers]).T for numbers in ([0.2, 0.5, 0.3], [-1.5, 0.0, 1.0], [0.16, 0.04, 0.01]))
GRID = np.linspace(-7.0, 7.0, 1401)  # of x_t, for the quadratures

SCHEDULES = {
    "cosine": schedules.cosine,
    "linear": schedules.linear,
    "quadratic": schedules.quadratic,
    "constant": schedules.constant,
    "harmonic": schedules.harmonic,
}
# linear, quadratic and constant need β ≤ 1, that is T ≥ 20. For fewer steps, linear is respaced from 1,000.
ANY_T = {
    "cosine": schedules.cosine,
    "harmonic": schedules.harmonic,
    "linear, respaced": lambda num_steps: schedules.evenly_spaced(schedules.linear(1000), num_steps),
}
FIXED = ("fixed_small", "fixed_large")
VARIANCES = {"fixed_small": "β̃", "fixed_large": "β", "optimal": "optimal σ*", "exact": "exact for each $x_t$"}


def gaussian_rows(num_images: int = 2048) -> list[dict[str, Any]]:
    """Gaussian data: the bound's gap in closed form and measured, for every variance, T and schedule."""
    rows = []
    for num_steps in (1, 2, 10, 100, 1000):
        totals = jax.jit(_gaussian_bounds, static_argnums=1)
        for name, make in ANY_T.items():
            schedule = make(num_steps)
            measured = {k: np.asarray(v, np.float64) for k, v in totals(schedule, num_images).items()}
            row = {"schedule": name, "num_steps": num_steps}
            gap = measured["learned"] - measured.pop("nll")
            row["exact"] = _mean(gap) | {
                "closed": float(oracles.gaussian_gap_nats(GAUSSIAN, "learned", schedule).prior)
            }
            for variance in FIXED:
                # Paired with the exact variance: the same x_0 and ε, so that most of the noise cancels.
                closed = float(oracles.gaussian_gap_nats(GAUSSIAN, variance, schedule).mismatch.sum())
                row[variance] = _mean(measured[variance] - measured["learned"]) | {"closed": closed}
            rows.append(row)
    return rows


def _gaussian_bounds(schedule: Schedule, num_images: int) -> dict[str, Array]:
    """Each image's bound under the exact and the fixed variances, and its exact −log p(x_0)."""
    x0 = jax.vmap(GAUSSIAN.sample)(jax.random.split(jax.random.key(0), num_images))
    keys = jax.random.split(jax.random.key(1), num_images)
    bounds = {"nll": -jax.vmap(GAUSSIAN.log_prob)(x0)}
    for variance in ("learned", *FIXED):
        p = reverse.make("x0", variance)
        bounds[variance] = bound_nats(GAUSSIAN.denoiser(p, schedule), p, schedule, x0, keys)
    return bounds


def bound_nats(denoise, p: reverse.Reverse, schedule: Schedule, x0: Array, keys: Array) -> Float[Array, " b"]:
    """Each example's bound in nats, continuous decoder, from one ε per t."""
    bound_bpd = likelihood.bound_bpd(
        denoise, p, schedule, x0, keys, clip_x0=False, decoder=oracles.continuous_decoder
    )
    return bound_bpd * x0[0].size * math.log(2)


def _mean(values: np.ndarray) -> dict[str, float]:
    return dict(zip(("measured", "stderr"), mean_and_stderr(values), strict=True))


class Step(NamedTuple):
    """One step of q for 1-D data, on the GRID of x_t, in float64."""

    density: np.ndarray  # q(x_t)
    mean: np.ndarray  # E[x_{t−1} | x_t]
    var: np.ndarray  # Var(x_{t−1} | x_t)
    beta: float
    beta_tilde: float  # 0 at t = 1

    def variance(self, name: str) -> np.ndarray:
        """A model's variance of x_{t−1} given x_t.

        At t = 1 all except "exact" have the same variance, the best constant, because the cost of a fixed width for
        a continuous decoder is not a question of the bound.
        """
        average = np.trapezoid(self.density * self.var, GRID)
        if name == "exact":
            return self.var
        fixed = {"fixed_small": self.beta_tilde, "fixed_large": self.beta, "optimal": average}
        return np.full_like(GRID, average if self.beta_tilde == 0 else fixed[name])


def line_steps(schedule: Schedule, mixture: tuple | None = None, grid: np.ndarray = GRID) -> list[Step]:
    """The steps t = 1…T of a 1-D mixture, by default LINE, from log α alone in float64."""
    log_alpha = np.asarray(schedule.log_alpha, np.float64)[1:]
    log_alpha_bar = np.cumsum(log_alpha)
    weight, m, v = LINE if mixture is None else mixture
    steps = []
    for t, end in enumerate(log_alpha_bar):
        before = log_alpha_bar[t - 1] if t else 0.0
        beta, alpha_bar, noise = -np.expm1(log_alpha[t]), np.exp(end), -np.expm1(end)
        beta_tilde = beta * -np.expm1(before) / noise
        total = alpha_bar * v + noise
        joint = weight * np.exp(-((grid - np.sqrt(alpha_bar) * m) ** 2) / (2 * total)) / np.sqrt(2 * np.pi * total)
        density = joint.sum(axis=0)
        share = joint / np.maximum(density, 1e-300)
        means = m + np.sqrt(alpha_bar) * v / total * (grid - np.sqrt(alpha_bar) * m)
        x0 = (share * means).sum(axis=0)
        x0_var = (share * (v * noise / total + (means - x0) ** 2)).sum(axis=0)
        of_x0 = np.exp(0.5 * before) * beta / noise
        of_x_t = np.exp(0.5 * log_alpha[t]) * -np.expm1(before) / noise
        steps.append(Step(density, of_x0 * x0 + of_x_t * grid, beta_tilde + of_x0**2 * x0_var, beta, beta_tilde))
    return steps


def line_entropy() -> float:
    """H(q(x_0)) of the 1-D mixture, in nats."""
    weight, m, v = LINE
    return _entropy((weight * np.exp(-((GRID - m) ** 2) / (2 * v)) / np.sqrt(2 * np.pi * v)).sum(axis=0))


def _entropy(density: np.ndarray) -> float:
    return float(-np.trapezoid(density * np.log(np.maximum(density, 1e-300)), GRID))


def line_gaps(schedule: Schedule) -> dict[str, tuple[float, float]]:
    """KL(q(x_{0:T}) ‖ p(x_{0:T})) of the 1-D mixture with the exact mean, by variance: (all steps, the prior's part).

    The expected cross entropy of a step is ½ E[log 2πv + Var(x_{t−1} | x_t)/v], and the entropy of
    q(x_{t−1} | x_t, x_0) is ½(log 2πβ̃ + 1). The sum of their differences and L_T is the bound; the gap is the bound
    minus H(q(x_0)).
    """
    steps = line_steps(schedule)
    weight, m, v = LINE
    alpha_bar = np.exp(np.sum(np.asarray(schedule.log_alpha, np.float64)))
    # L_T, the mean over x_0 of KL(q(x_T | x_0) ‖ N(0, 1)).
    prior_term = 0.5 * (alpha_bar * np.sum(weight * (v + m**2)) - alpha_bar - np.log1p(-alpha_bar))
    last = steps[-1].density
    log_ratio = np.log(np.maximum(last, 1e-300)) + 0.5 * GRID**2 + 0.5 * math.log(2 * math.pi)
    prior = float(np.trapezoid(last * log_ratio, GRID))
    gaps = {}
    for variance in VARIANCES:
        bound = prior_term
        for step in steps:
            chosen = step.variance(variance)
            cross_entropy = 0.5 * (np.log(2 * np.pi * chosen) + step.var / chosen)
            entropy = 0.5 * (math.log(2 * math.pi * step.beta_tilde) + 1) if step.beta_tilde else 0.0
            bound += np.trapezoid(step.density * cross_entropy, GRID) - entropy
        gaps[variance] = float(bound) - line_entropy() - prior, prior
    return gaps


def line_targets(schedule: Schedule, shift: float = 0.0) -> dict[str, float]:
    """The loss, the KL to the true reversal, and their difference: sums over t ≥ 2 for the 1-D mixture, in nats.

    p_θ has the variance σ*² and the mean E[x_{t−1} | x_t] + shift σ*. "loss" is E KL(q(x_{t−1} | x_t, x_0) ‖ p_θ),
    "reversal" is E KL(q(x_{t−1} | x_t) ‖ p_θ), and "information" is I(x_{t−1}; x_0 | x_t), which no p_θ changes.
    """
    steps = line_steps(schedule)
    totals = dict.fromkeys(("loss", "reversal", "information"), 0.0)
    for before, step in itertools.pairwise(steps):
        average = step.variance("optimal")[0]
        cross_entropy = 0.5 * (math.log(2 * math.pi * average) + 1 + shift**2)
        known_x0 = 0.5 * (math.log(2 * math.pi * step.beta_tilde) + 1)
        # H(x_{t−1} | x_t) = H(x_{t−1}) + H(x_t | x_{t−1}) − H(x_t)
        unknown_x0 = _entropy(before.density) + 0.5 * (math.log(2 * math.pi * step.beta) + 1) - _entropy(step.density)
        parts = (cross_entropy - known_x0, cross_entropy - unknown_x0, unknown_x0 - known_x0)
        totals = {name: total + part for (name, total), part in zip(totals.items(), parts, strict=True)}
    return totals


def line_rows() -> list[dict[str, Any]]:
    """The 1-D gap against T, schedule and variance, all by quadrature."""
    rows = []
    for name, make in SCHEDULES.items():
        for num_steps in (5, 10, 20, 50, 100, 200, 500, 1000):
            if num_steps < 20 and name in ("linear", "quadratic", "constant"):
                continue
            schedule = make(num_steps)
            for variance, (steps, prior) in line_gaps(schedule).items():
                rows.append(
                    {"schedule": name, "num_steps": num_steps, "variance": variance, "steps": steps, "prior": prior}
                )
    return rows


def slopes(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """d log(gap)/d log T by least squares over T ≥ 100, without the prior's part: [schedule][variance]."""
    result: dict[str, dict[str, float]] = {}
    for name in SCHEDULES:
        for variance in VARIANCES:
            chosen = [r for r in rows if (r["schedule"], r["variance"]) == (name, variance) and r["num_steps"] >= 100]
            log_t, log_gap = np.log([(r["num_steps"], r["steps"]) for r in chosen]).T
            result.setdefault(name, {})[variance] = float(np.polyfit(log_t, log_gap, 1)[0])
    return result


def looseness_rows(num_steps: tuple[int, ...] = (5, 10, 20, 50)) -> list[dict[str, Any]]:
    """The 1-D gap and its part from the model, KL(q(x_0) ‖ p(x_0)), with p(x_0) by quadrature over the whole chain."""
    weight, m, v = LINE
    data = (weight * np.exp(-((GRID - m) ** 2) / (2 * v)) / np.sqrt(2 * np.pi * v)).sum(axis=0)
    rows = []
    for t in num_steps:
        schedule = schedules.cosine(t)
        steps, gaps = line_steps(schedule), line_gaps(schedule)
        for variance in VARIANCES:
            density = np.exp(-(GRID**2) / 2) / math.sqrt(2 * math.pi)
            for step in reversed(steps):
                std = np.sqrt(step.variance(variance))
                kernel = np.exp(-0.5 * ((GRID[:, None] - step.mean) / std) ** 2)
                density = kernel @ (density / std) * ((GRID[1] - GRID[0]) / math.sqrt(2 * math.pi))
            model = np.trapezoid(data * np.log(np.maximum(data, 1e-300) / np.maximum(density, 1e-300)), GRID)
            gap = sum(gaps[variance])
            rows.append({"num_steps": t, "variance": variance, "gap": gap, "model": float(model)})
    return rows


def plot_line(path: Path, rows: list[dict[str, Any]], looseness: list[dict[str, Any]]) -> None:
    """Plots the 1-D gap against T by variance and by schedule, and the model's part of it."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    by_variance, by_schedule, split = figure.subplots(1, 3)
    fitted = slopes(rows)
    for variance, label in VARIANCES.items():
        chosen = [r for r in rows if (r["schedule"], r["variance"]) == ("cosine", variance)]
        by_variance.loglog(
            *np.array([(r["num_steps"], r["steps"]) for r in chosen]).T, "o-", markersize=3,
            label=f"{label}: slope {fitted['cosine'][variance]:.2f}",
        )  # fmt: skip
    by_variance.set_title("cosine schedule", fontsize="medium")
    for name in SCHEDULES:
        chosen = [r for r in rows if (r["schedule"], r["variance"]) == (name, "optimal")]
        t, steps = np.array([(r["num_steps"], r["steps"]) for r in chosen]).T
        by_schedule.loglog(t, steps, "o-", markersize=3, label=f"{name}: {fitted[name]['optimal']:.2f}")
    by_schedule.set_title("optimal σ*", fontsize="medium")
    for axes in (by_variance, by_schedule):
        axes.set(xlabel="T", ylabel="gap of the steps, bound − NLL (nats)")
        axes.legend(fontsize="small", title="slope over T ≥ 100", title_fontsize="small")
    for k, (variance, label) in enumerate(VARIANCES.items()):
        chosen = [r for r in looseness if r["variance"] == variance]
        t, gap, model = np.array([(r["num_steps"], r["gap"], r["model"]) for r in chosen]).T
        split.loglog(t, gap, "o-", markersize=3, color=f"C{k}", label=label)
        split.loglog(t, model, "x--", markersize=4, color=f"C{k}")
    split.set(xlabel="T", ylabel="nats")
    split.set_xticks([5, 10, 20, 50], ["5", "10", "20", "50"])
    split.set_xticks([], minor=True)
    split.set_title("cosine; solid: gap of the bound,\ndashed: the model's KL(q(x₀) ‖ p(x₀))", fontsize="medium")
    split.legend(fontsize="small")
    for axes in (by_variance, by_schedule, split):
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)
