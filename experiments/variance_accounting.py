"""The cost of each variance for a trained model in bits/dim, and the gain of the optimal one. Nothing is trained.

    python -m experiments.variance_accounting --workdir=runs/digits_fixed [--num_images=256]

The network passes over training images to estimate σ*_t, and over test images to score the bound under β̃, β, three
interpolations, σ*_t and the learned variance, if the network has one, all with the same mean and noise. Writes
variance_accounting.md, .csv and .png into the working directory, and x0_variance.npz, which eval.variance=optimal
reads.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from diffusion import likelihood, variances
from diffusion.data import Source
from diffusion.data.levels import to_unit
from diffusion.evaluation.images import subset
from diffusion.evaluation.pairs import ImageTimePairs, every_t
from diffusion.experiment import build, ema, workdir
from diffusion.likelihood import Measure
from diffusion.model import Model
from diffusion.reverse import VARIANCES, Variance
from diffusion.runtime import devices, files
from diffusion.schedules import Schedule
from diffusion.variances import Split, X0Terms, X0Variance
from experiments import tables
from experiments.commands import argument_parser, exit_with

FILE = "variance_accounting"
# Bao et al. (2022) have two estimates: from the size of the prediction, right for a perfect mean, and from its error.
OPTIMAL, OPTIMAL_FOR_MEAN = "optimal", "optimal for this mean"


class Row(NamedTuple):
    """One line of the table, in bits/dim; `difference` is to the model's own variance, paired by image."""

    variance: str
    bpd: float
    stderr: float
    difference: float
    difference_stderr: float
    decoder: float
    mismatch: float
    mean_error: float


def main() -> None:
    """Runs the command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="directory of a trained run")
    parser.add_argument(
        "--num_images",
        type=int,
        default=256,
        help="test images, and as many training images for σ*; 0: every test image",
    )
    parser.add_argument("--checkpoint", default="latest", help="latest, best or a step")
    arguments = parser.parse_args()
    run(arguments.workdir, arguments.num_images, arguments.checkpoint)


def run(directory: Path, num_images: int, checkpoint: str = "latest", num_train: int = 0) -> None:
    """Estimates σ*_t, scores the test images under every variance, prints and saves the results.

    Args:
        directory: of a trained run.
        num_images: number of test images; 0: all.
        checkpoint: latest, best or a step.
        num_train: training images for σ*; 0: as many as test images.

    Raises:
        ValueError: num_images is neither 0 nor in 2…N, where N is the size of the test split.
    """
    config = workdir.read_config(directory)
    train_set, test_set = (build.load_data(config, split) for split in ("train", "test"))
    num_images = num_images or len(test_set)
    if not 2 <= num_images <= len(test_set):
        raise ValueError(f"--num_images={num_images} must be 0 or in 2…{len(test_set)}, the size of the test split")
    trained = workdir.load(directory, checkpoint)
    model, own = trained.model, config.model.variance

    train_numbers = subset(len(train_set), min(num_train or num_images, len(train_set)))
    terms = estimate_x0_terms(config, model, train_set, train_numbers)
    analytic, error = X0Variance.over_images(terms.analytic), X0Variance.over_images(terms.error)
    ema.save_x0_variance(directory, analytic, error, trained.state)
    optimal = {OPTIMAL: analytic, OPTIMAL_FOR_MEAN: error}
    test_numbers = subset(len(test_set), num_images)
    splits = account(config, model, test_set, test_numbers, optimal)
    prior = prior_bpd(model, test_set, test_numbers)
    rows = table(splits, prior, own)

    title = (
        f"{config.data.name}, {num_images} test images, step {trained.state.step} (EMA), "
        f"{config.schedule.name} schedule, T = {config.schedule.num_steps}"
    )
    text = markdown(rows, own, title, len(terms.error), prior.mean())
    files.write_text(directory / f"{FILE}.md", text)
    about = {"ema_sha256": trained.state.sha256, "images": num_images, "train_images": len(train_numbers)}
    tables.save_csv(directory / f"{FILE}.csv", [row._asdict() | about for row in rows])
    plot(directory / f"{FILE}.png", splits, optimal, own, model.schedule, title)
    print(text)


def estimate_x0_terms(config: ConfigDict, model: Model, source: Source, numbers: Int[np.ndarray, " n"]) -> X0Terms:
    """Each training image's two estimates of Var(x_0 | x_t): leaves [N, T]."""

    def measure_of(model: Model) -> Measure:
        return variances.x0_terms(model.p)

    pairs = ImageTimePairs(measure_of, config.seed, config.eval.batch_size, stream="variance")
    t = every_t(len(numbers), model.schedule.num_steps)
    return pairs.all(devices.replicate(model), source, numbers, t, "estimate σ*")


def account(
    config: ConfigDict,
    model: Model,
    source: Source,
    numbers: Int[np.ndarray, " n"],
    optimal: dict[str, X0Variance],
) -> dict[str, Split]:
    """Each image's terms under every variance, in bits/dim and split: leaves [N, T].

    The noise is that of `evaluation.bound`, so the model's own variance repeats its numbers.
    """
    candidates = {
        "fixed_small": VARIANCES["fixed_small"],
        **{f"interpolated {fraction:g}": variances.interpolated(fraction) for fraction in (0.25, 0.5, 0.75)},
        "fixed_large": VARIANCES["fixed_large"],
        **{name: _optimal_given(estimate) for name, estimate in optimal.items()},
        config.model.variance: VARIANCES[config.model.variance],
    }

    def measure_of(model: Model) -> Measure:
        return variances.split_terms_bpd(model.p, candidates, model.num_levels)

    pairs = ImageTimePairs(measure_of, config.seed, config.eval.batch_size)
    t = every_t(len(numbers), model.schedule.num_steps)
    return pairs.all(devices.replicate(model), source, numbers, t, f"score {source.split}")


def _optimal_given(estimate: X0Variance) -> Variance:
    known = jnp.asarray(estimate.mean)

    def log_var(row: Schedule, raw: jax.Array) -> jax.Array:
        return VARIANCES["optimal"].log_var(dataclasses.replace(row, x0_variance=known[row.t]), raw)

    return Variance(log_var, is_learned=False)


def prior_bpd(model: Model, source: Source, numbers: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """L_T of every image."""

    def one(image: jax.Array) -> jax.Array:
        return likelihood.prior_bpd(model.schedule, to_unit(image, model.num_levels))

    return np.asarray(jax.jit(jax.vmap(one))(source.images(numbers)), np.float64)


def table(splits: dict[str, Split], prior: Float[np.ndarray, " n"], own: str) -> list[Row]:
    """The mean over images of each variance's bound and its parts, lowest bits/dim first."""
    totals = {name: sum(split).sum(axis=1) + prior for name, split in splits.items()}
    rows = []
    for name, split in splits.items():
        total, difference = totals[name], totals[name] - totals[own]
        means = *tables.mean_and_stderr(total), *tables.mean_and_stderr(difference)
        parts = (float(part.sum(axis=1).mean()) for part in split)
        rows.append(Row(name, *means, *parts))
    return sorted(rows, key=lambda row: row.bpd)


def markdown(rows: list[Row], own: str, title: str, num_train: int, prior_bpd: float) -> str:
    """The table, and how its numbers were measured."""
    head = [
        f"# Variance accounting: {title}",
        "",
        f"Bits/dim = decoder (t = 1) + variance mismatch + mean error (t > 1) + prior ({prior_bpd:.2g}). One ε per "
        "image and t, the same for all variances; x̂_0 clipped to [-1, 1]; exact normal CDF in the decoder; σ* from "
        f"{num_train} training images. ± is one standard error over images; the difference to {own} is paired by "
        "image.",
        "",
    ]
    columns = ["variance", "bits/dim", "±", f"less {own}", "±", "decoder", "variance mismatch", "mean error"]
    cells = []
    for row in rows:
        numbers = [f"{value:.5f}" for value in row[1:]]
        if row.variance == own:
            numbers[2:4] = "–", "–"
        cells.append([row.variance, *numbers])
    return "\n".join([*head, tables.markdown(columns, cells)])


def plot(
    path: Path,
    splits: dict[str, Split],
    optimal: dict[str, X0Variance],
    own: str,
    schedule: Schedule,
    title: str,
) -> None:
    """Plots per t: each variance's KL term, its cumulative sum minus the model's own, and σ*² in units of β̃."""
    t = np.arange(2, schedule.num_steps + 1)
    terms = {name: (split.mismatch + split.mean_error).mean(axis=0)[1:] for name, split in splits.items()}
    figure = Figure(figsize=(8, 10), layout="constrained")
    per_t, cumulative, sigma = figure.subplots(3, 1, sharex=True)
    figure.suptitle(title, fontsize="medium")
    bold = [name for name in terms if not name.startswith("interpolated")]
    colors = {name: f"C{bold.index(name)}" if name in bold else "0.7" for name in terms}
    for name, term in sorted(terms.items(), key=lambda named: named[1].sum()):
        per_t.loglog(t, term, color=colors[name], label=f"{name}: {term.sum():.4f}")
        cumulative.semilogx(t, np.cumsum(term - terms[own]), color=colors[name])
    per_t.set_ylabel("KL term of t (bits/dim)")
    per_t.legend(title="sum over t > 1", fontsize="small")
    cumulative.set_ylabel(f"sum up to t, less {own}\n(bits/dim)")
    _plot_sigma(sigma, optimal, schedule, colors)
    for axes in (per_t, cumulative, sigma):
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)


def _plot_sigma(axes: Axes, optimal: dict[str, X0Variance], schedule: Schedule, colors: dict[str, str]) -> None:
    """σ*²/β̃ of each estimate, and β/β̃, for t > 1."""
    t = np.arange(2, schedule.num_steps + 1)
    beta_tilde, beta = (np.asarray(leaf, np.float64)[2:] for leaf in (schedule.beta_tilde, schedule.beta))
    posterior_x0 = np.asarray(schedule.posterior_x0)[2:]

    def ratio(x0_variance: np.ndarray) -> np.ndarray:
        return 1 + posterior_x0**2 * np.clip(x0_variance[2:], 0, 1) / beta_tilde

    axes.loglog(t, beta / beta_tilde, color=colors["fixed_large"], label="fixed_large")
    for name, estimate in optimal.items():
        low, high = (ratio(estimate.mean + k * estimate.stderr) for k in (-2, 2))
        axes.loglog(t, ratio(estimate.mean), color=colors[name], label=f"{name}, ± 2 standard errors")
        axes.fill_between(t, low, high, alpha=0.3, color=colors[name])
    axes.set(xlabel="t", ylabel="variance / β̃")
    axes.legend(fontsize="small")


if __name__ == "__main__":
    exit_with(main)
