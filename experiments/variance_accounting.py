"""What each variance costs a trained model in bits/dim, and what the optimal one saves; nothing is trained.

    python -m experiments.variance_accounting --workdir=runs/digits [--num_images=256]

Two passes of the network per image: over training images for σ*_t, over test images for the bound under β̃, β, three
interpolations, σ*_t and, where the network has it, the learned variance, all with the same mean and noise. Leaves in
the working directory x0_variance.npz (see `variances.save`) and variance_accounting.md, .csv and .png.
"""

import argparse
import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PyTree
from matplotlib.figure import Figure

from diffusion import data, likelihood, variances
from diffusion.data import ImageSet
from diffusion.experiment import build, workdir
from diffusion.experiment.build import Experiment
from diffusion.programs import evaluate
from diffusion.reporting import metrics_log
from diffusion.reverse import VARIANCES, Variance
from diffusion.runtime import randomness
from diffusion.schedules import Schedule
from diffusion.training import devices
from diffusion.training.step import to_unit
from diffusion.variances import Split, X0Terms, X0Variance

FILE = "variance_accounting"
# Bao et al. (2022) have two: from the size of the prediction, right for a perfect mean, and from its error.
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
    """The command; what is wrong with its input is one sentence and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="of a run with a checkpoint")
    parser.add_argument(
        "--num_images",
        type=int,
        default=256,
        help="test images, and as many training images for σ*; 0: every test image",
    )
    arguments = parser.parse_args()
    try:
        run(arguments.workdir, arguments.num_images)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def run(directory: Path, num_images: int) -> None:
    """Estimates σ*_t, scores the test images under every variance, prints and saves what came out."""
    config = workdir.read_config(directory)
    train_set, test_set = (data.load(config.data.name, split, config.data.data_dir) for split in ("train", "test"))
    num_images = num_images or len(test_set.images)
    if not 2 <= num_images <= len(test_set.images):
        raise ValueError(
            f"--num_images={num_images} must be 0 or in 2…{len(test_set.images)}, the size of the test split"
        )
    experiment = build.experiment(config, test_set.images.shape[1:], test_set.num_levels)
    state = workdir.restore(experiment, directory)
    params = devices.replicate(state.ema_params)

    train_numbers = evaluate.subset(len(train_set.images), min(num_images, len(train_set.images)))
    terms = x0_terms(experiment, params, train_set, train_numbers)
    analytic, error = X0Variance.over_images(terms.analytic), X0Variance.over_images(terms.error)
    variances.save(directory, analytic, error, int(state.step))
    test_numbers = evaluate.subset(len(test_set.images), num_images)
    splits, prior = account(experiment, params, test_set, test_numbers, analytic, error)
    rows = table(splits, prior, config.model.variance)

    title = (
        f"{config.data.name}, {num_images} test images, step {state.step} (EMA), {config.schedule.name} schedule, "
        f"T = {config.schedule.num_steps}"
    )
    text = markdown(rows, config.model.variance, title, len(terms.error), prior.mean())
    (directory / f"{FILE}.md").write_text(text)
    with (directory / f"{FILE}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([Row._fields, *rows])
    optimal = {OPTIMAL: analytic, OPTIMAL_FOR_MEAN: error}
    schedule = experiment.schedule_of(state.ema_params)
    plot(directory / f"{FILE}.png", splits, optimal, config.model.variance, schedule, title)
    print(text)


def x0_terms(experiment: Experiment, params: PyTree, image_set: ImageSet, numbers: Int[np.ndarray, " n"]) -> X0Terms:
    """Each training image's two estimates of Var(x_0 | x_t): leaves [N, T]."""

    def one_batch(denoise, schedule, x0, keys):
        return variances.x0_terms(denoise, experiment.p, schedule, x0, keys)

    return _over_images(experiment, params, image_set, numbers, one_batch, "variance", "estimate σ*")


def account(
    experiment: Experiment,
    params: PyTree,
    image_set: ImageSet,
    numbers: Int[np.ndarray, " n"],
    analytic: X0Variance,
    error: X0Variance,
) -> tuple[dict[str, Split], Float[np.ndarray, " n"]]:
    """Each image's bound under every variance, split (leaves [N, T]), and its prior term [N]; in bits/dim.

    The noise is that of `evaluate.bound_of`, so the model's own variance repeats its numbers.
    """
    own = experiment.config.model.variance
    candidates = {
        "fixed_small": VARIANCES["fixed_small"],
        **{f"interpolated {fraction:g}": variances.interpolated(fraction) for fraction in (0.25, 0.5, 0.75)},
        "fixed_large": VARIANCES["fixed_large"],
        OPTIMAL: _optimal_given(analytic),
        OPTIMAL_FOR_MEAN: _optimal_given(error),
        own: VARIANCES[own],
    }

    def one_batch(denoise, schedule, x0, keys):
        splits = variances.split_terms_bpd(denoise, experiment.p, candidates, schedule, x0, keys, experiment.num_levels)
        return splits, jax.vmap(lambda image: likelihood.prior_bpd(schedule, image))(x0)

    return _over_images(experiment, params, image_set, numbers, one_batch, "eval", "score")


def _optimal_given(estimate: X0Variance) -> Variance:
    known = jnp.asarray(estimate.mean)
    with_estimate = lambda row: dataclasses.replace(row, x0_variance=known[row.t])  # noqa: E731
    return Variance(lambda row, raw: VARIANCES["optimal"].log_var(with_estimate(row), raw), is_learned=False)


def _over_images(
    experiment: Experiment,
    params: PyTree,
    image_set: ImageSet,
    numbers: Int[np.ndarray, " n"],
    one_batch: Callable[..., PyTree],
    stream: str,
    name: str,
) -> PyTree:
    """one_batch(denoise, schedule, x0 [B, H, W, C], keys [B]) over all images: float64 leaves [N, ...]."""
    seed_key = randomness.stream(experiment.config.seed, stream)

    def on_device(params, images, image_numbers, split_number):
        keys = randomness.per_item(jax.random.fold_in(seed_key, split_number), image_numbers)
        x0 = to_unit(images, experiment.num_levels)
        return one_batch(experiment.denoiser(params), experiment.schedule_of(params), x0, keys)

    compiled, results = devices.over_devices(on_device), []
    with metrics_log.Progress(len(numbers), desc=name, unit="image") as progress:
        for items, num_real in devices.padded_batches(len(numbers), experiment.config.eval.batch_size):
            split = np.full(len(items), image_set.split_number)
            batch = compiled(params, image_set.images[numbers[items]], numbers[items], split)
            results.append(jax.tree.map(lambda array: devices.gather(array, num_real), batch))  # noqa: B023
            progress.update(num_real)
    return jax.tree.map(lambda *parts: np.concatenate(parts).astype(np.float64), *results)


def table(splits: dict[str, Split], prior: Float[np.ndarray, " n"], own: str) -> list[Row]:
    """The mean over images of each variance's bound and of its parts, cheapest first."""
    totals = {name: sum(split).sum(axis=1) + prior for name, split in splits.items()}

    def stderr(per_image: np.ndarray) -> float:
        return float(per_image.std(ddof=1) / len(per_image) ** 0.5)

    rows = []
    for name, split in splits.items():
        difference = totals[name] - totals[own]
        parts = (float(part.sum(axis=1).mean()) for part in split)
        rows.append(
            Row(
                name,
                float(totals[name].mean()),
                stderr(totals[name]),
                float(difference.mean()),
                stderr(difference),
                *parts,
            )
        )
    return sorted(rows, key=lambda row: row.bpd)


def markdown(rows: list[Row], own: str, title: str, num_train: int, prior_bpd: float) -> str:
    """The table with what was scored and how, as every number needs it."""
    lines = [
        f"# Variance accounting: {title}",
        "",
        f"Bits/dim = decoder (t = 1) + variance mismatch + mean error (t > 1) + prior ({prior_bpd:.2g}). One ε per "
        "image and t, the same for all variances; x̂_0 clipped to [-1, 1]; exact normal CDF in the decoder; σ* from "
        f"{num_train} training images. ± is one standard error over images, that of the difference to {own} paired by "
        "image.",
        "",
        f"| variance | bits/dim | ± | less {own} | ± | decoder | variance mismatch | mean error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = [f"{value:.5f}" for value in row[1:]]
        if row.variance == own:
            numbers[2:4] = "–", "–"
        lines.append(f"| {row.variance} | {' | '.join(numbers)} |")
    return "\n".join(lines) + "\n"


def plot(
    path: Path,
    splits: dict[str, Split],
    optimal: dict[str, X0Variance],
    own: str,
    schedule: Schedule,
    title: str,
) -> None:
    """Per t: each variance's KL term, what it has cost up to t beside the model's own, and σ*² in units of β̃."""
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

    beta_tilde, beta = (np.asarray(leaf, np.float64)[2:] for leaf in (schedule.beta_tilde, schedule.beta))
    sigma.loglog(t, beta / beta_tilde, color=colors["fixed_large"], label="fixed_large")
    for name, estimate in optimal.items():
        low, mean, high = (
            1 + np.asarray(schedule.posterior_x0)[2:] ** 2 * np.clip(x0_variance[2:], 0, 1) / beta_tilde
            for x0_variance in (estimate.mean + k * estimate.stderr for k in (-2, 0, 2))
        )
        sigma.loglog(t, mean, color=colors[name], label=f"{name}, ± 2 standard errors")
        sigma.fill_between(t, low, high, alpha=0.3, color=colors[name])
    sigma.set(xlabel="t", ylabel="variance / β̃")
    sigma.legend(fontsize="small")
    for axes in (per_t, cumulative, sigma):
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
