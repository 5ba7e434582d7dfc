"""Model error and looseness during training: the part of `experiments.bound_tightness` that splits the gap.

    E[bound] − H(q(x_0)) = KL(q(x_0) ‖ p_θ(x_0)) + E KL(q(x_{1:T} | x_0) ‖ p_θ(x_{1:T} | x_0))

The data are a mixture of two Gaussians in one dimension, and T = 3. The model is too small: five numbers for each t in
p_θ(x_{t−1} | x_t) = N(a_t x_t + b_t tanh(c_t x_t) + d_t, 0.02 + e^{s_t}). All expectations are quadratures in float64
on one grid, and training is gradient descent without noise.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from diffusion import schedules
from diffusion.schedules import Schedule
from experiments import tables
from experiments.tightness_known import line_steps

MODES = tuple(np.asarray([numbers]).T for numbers in ([0.4, 0.6], [-1.0, 1.0], [0.09, 0.09]))
GAUSSIAN = tuple(np.asarray([[number]]) for number in (1.0, 0.5, 0.09))
GRID = np.linspace(-7.0, 7.0, 141)
SCHEDULES = {
    "suitable": schedules.from_betas([0.1, 0.2, 1.0]),
    # Nearly all of the noise at once: x_1 says little about x_0, so the posterior has two modes and no Gaussian fits.
    "unsuitable": schedules.from_betas([0.98, 0.5, 1.0]),
}
# a_t, b_t, c_t, d_t and s_t of each t: a wide step that shrinks x_t a little.
START = np.tile([0.8, 0.1, 1.0, 0.0, 0.0], (3, 1))
LEAST_VAR = 0.02  # of p_θ: wide enough for the grid

Theta = Float[Array, "t 5"]


class Forward(NamedTuple):
    """q on a grid with the spacing h, in float64."""

    grid: Float[Array, " n"]
    density: Float[Array, "t+1 n"]  # of x_0…x_T
    mean: Float[Array, "t n"]  # E[x_{t−1} | x_t]
    var: Float[Array, "t n"]
    beta: Float[Array, " t"]

    @property
    def spacing(self) -> Array:
        return self.grid[1] - self.grid[0]


def forward(schedule: Schedule, mixture: tuple, grid: np.ndarray = GRID) -> Forward:
    """q of a 1-D mixture; call it with float64 enabled."""
    steps = line_steps(schedule, mixture, grid)
    weight, m, v = mixture
    x0 = (weight * np.exp(-((grid - m) ** 2) / (2 * v)) / np.sqrt(2 * np.pi * v)).sum(axis=0)
    tables = [x0, *(step.density for step in steps)], [step.mean for step in steps], [step.var for step in steps]
    return Forward(*(jnp.asarray(np.asarray(table)) for table in (grid, *tables, [step.beta for step in steps])))


def log_normal(x: Array, mean: Array, var: Array) -> Array:
    return -0.5 * (jnp.log(2 * jnp.pi * var) + (x - mean) ** 2 / var)


def reverse_step(theta: Float[Array, "5"], x_t: Array) -> tuple[Array, Array]:
    """Mean and variance of p_θ(x_{t−1} | x_t)."""
    slope, gain, bend, offset, log_var = theta
    return slope * x_t + gain * jnp.tanh(bend * x_t) + offset, LEAST_VAR + jnp.exp(log_var)


def gap(theta: Theta, q: Forward) -> Float[Array, ""]:
    """E[bound] − H(q(x_0)), from integrals over one x_t at a time."""
    total = -q.spacing * q.density[-1] @ log_normal(q.grid, 0.0, 1.0)
    for of_t, density, exact, var in zip(theta, q.density[1:], q.mean, q.var, strict=True):
        mean, chosen = reverse_step(of_t, q.grid)
        cross = 0.5 * (jnp.log(2 * jnp.pi * chosen) + (var + (exact - mean) ** 2) / chosen)
        total += q.spacing * density @ cross
    return total - entropy(q.density[0], q.spacing) - 0.5 * jnp.sum(jnp.log(2 * jnp.pi * q.beta) + 1)


def entropy(density: Float[Array, " n"], spacing: Array) -> Float[Array, ""]:
    return -spacing * jnp.sum(jax.scipy.special.xlogy(density, density))


def terms(theta: Theta, q: Forward) -> tuple[Float[Array, ""], Float[Array, " t"]]:
    """KL(q(x_0) ‖ p_θ(x_0)), and E KL(q(x_t | x_{t−1}) ‖ p_θ(x_t | x_{t−1})) for each t.

    p_θ(x_t | x_{t−1}) = p_θ(x_{t−1} | x_t) p_θ(x_t)/p_θ(x_{t−1}) by Bayes' rule: given x_0, the latents of q and of
    p_θ are Markov chains from 1 to T, so these sum to E KL(q(x_{1:T} | x_0) ‖ p_θ(x_{1:T} | x_0)).
    """
    x, log_p = q.grid, log_normal(q.grid, 0.0, 1.0)
    looseness = []
    for t in reversed(range(len(theta))):
        mean, var = reverse_step(theta[t], x)
        log_joint = log_normal(x[:, None], mean[None], var) + log_p[None]  # [x_{t−1}, x_t]
        log_p = jax.nn.logsumexp(log_joint, axis=1) + jnp.log(q.spacing)
        log_q = log_normal(x[None], jnp.sqrt(1 - q.beta[t]) * x[:, None], q.beta[t])
        of_x = jnp.sum(jnp.exp(log_q) * (log_q - log_joint + log_p[:, None]), axis=1) * q.spacing
        looseness.append(q.spacing * q.density[t] @ of_x)
    cross = -q.spacing * q.density[0] @ log_p
    return cross - entropy(q.density[0], q.spacing), jnp.stack(looseness[::-1])


@jax.jit
def both(theta: Theta, q: Forward) -> Float[Array, "3"]:
    """The gap, the model's error and the looseness, each from its own integrals."""
    error, looseness = terms(theta, q)
    return jnp.stack([gap(theta, q), error, looseness.sum()])


def descend(
    loss: Callable[[Theta], Array], theta: Theta, num_updates: int, rate: float
) -> tuple[Float[np.ndarray, "updates+1 t 5"], bool]:
    """θ before and after each update of gradient descent, and whether the loss fell every time."""

    def update(theta: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        value, gradient = jax.value_and_grad(loss)(theta)
        return theta - rate * gradient, (theta, value)

    last, (path, values) = jax.jit(lambda theta: jax.lax.scan(update, theta, None, length=num_updates))(theta)
    return np.concatenate([path, last[None]]), bool(np.all(np.diff(values) <= 0))


class Training(NamedTuple):
    """Gradient descent on the bound's gap under the q named in `lowers`, or for "log p" on the model's error."""

    name: str
    lowers: str
    start: str  # the training whose last θ is the first; "" for START
    num_updates: int
    rate: float


TRAININGS = (
    Training("bound, suitable q", "suitable", "", 5000, 0.02),
    Training("bound, unsuitable q", "unsuitable", "", 5000, 0.02),
    Training("log p", "log p", "bound, suitable q", 3000, 0.02),
    Training("from there: bound, suitable q", "suitable", "log p", 10_000, 0.005),
    Training("from there: bound, unsuitable q", "unsuitable", "log p", 10_000, 0.005),
)
SHOWN = ("bound, suitable q", "bound, unsuitable q", "from there: bound, suitable q", "from there: bound, unsuitable q")


def rows(mixture: tuple = MODES, trainings: tuple[Training, ...] | None = None) -> list[dict[str, Any]]:
    """Per training, the three terms under each q after some updates, and whether each update lowered the loss."""
    with jax.enable_x64(True):
        qs = {name: forward(schedule, mixture) for name, schedule in SCHEDULES.items()}
        last, result = {"": jnp.asarray(START)}, []
        for training in trainings or TRAININGS:

            def loss(theta: Array, lowers: str = training.lowers) -> Array:
                return terms(theta, qs["suitable"])[0] if lowers == "log p" else gap(theta, qs[lowers])

            path, falls = descend(loss, last[training.start], training.num_updates, training.rate)
            last[training.name] = jnp.asarray(path[-1])
            updates = np.unique(np.geomspace(1, training.num_updates, 40).astype(int))
            updates = [0, *updates.tolist()]
            chosen = jnp.asarray(path[updates])
            under = {name: np.asarray(jax.vmap(both, (0, None))(chosen, q)).tolist() for name, q in qs.items()}
            result.append({**training._asdict(), "updates": updates, "falls": falls, "terms": under})
        return result


def gaussian_row() -> dict[str, Any]:
    """The first training on one Gaussian, whose reverse process is in the family of p_θ."""
    return rows(GAUSSIAN, TRAININGS[:1])[0]


def table(found: list[dict[str, Any]], gaussian: dict[str, Any]) -> str:
    """The model's error and the looseness under both q, for the start and for every training's last θ."""
    cells = [("the start", found[0], 0), *((row["name"], row, -1) for row in found)]
    cells += [("one Gaussian: the start", gaussian, 0), ("one Gaussian: bound, suitable q", gaussian, -1)]
    lines = []
    for name, row, k in cells:
        by_q = [row["terms"][q][k] for q in SCHEDULES]
        lines.append([name, f"{by_q[0][1]:.4f}", *(f"{looseness:.4f}" for _, _, looseness in by_q)])
    falls = all(row["falls"] for row in [*found, gaussian])
    head = ["θ after", "KL(q(x_0) ‖ p_θ(x_0))", *(f"looseness, {q} q" for q in SCHEDULES)]
    return f"Every update lowered its loss: {falls}.\n\n" + tables.markdown(head, lines)


def plot(path: Path, found: list[dict[str, Any]]) -> None:
    """Plots the gap and its two terms along four trainings, each under its training's q."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    for axes, row in zip(figure.subplots(1, 4, sharey=True), [r for r in found if r["name"] in SHOWN], strict=True):
        gaps, error, looseness = np.array(row["terms"][row["lowers"]]).T
        axes.plot(row["updates"], gaps, color="black", linewidth=2.5, label="bound − H, the sum")
        axes.plot(row["updates"], error, color="C3", label=r"KL(q($x_0$) ‖ $p_\theta$($x_0$)): error")
        axes.plot(row["updates"], looseness, color="C0", linestyle="--", label="looseness")
        axes.set_xscale("symlog", linthresh=1)
        axes.set(yscale="log", xlabel="updates", title=row["name"].replace("from there:", "from the best log p:"))
        axes.set_ylim(1e-3, 30)
        axes.set_xlim(0, None)
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("nats")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
