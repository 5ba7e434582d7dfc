"""How few steps are enough? The Fréchet distance and the respaced bits/dim for sampler × number of steps × variance.

    python -m experiments.steps --workdir=runs/digits_fixed [--steps=5,10,25,50] [--features=classifier]

The report has the form of Nichol & Dhariwal (2021), figure 8, and Bao et al. (2022), tables 1 and 2, for one trained
run. Nothing is trained. Bits/dim are those of the respaced process on the test images. Only the ancestral sampler has
them, because the others are not reverse processes with a likelihood. Writes steps.md, .csv and .png into the working
directory. The samples go into its folder steps/, so a stopped call resumes.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, ScalarFormatter

from diffusion import schedules
from diffusion.data import Source
from diffusion.evaluation.bound import full_bound
from diffusion.evaluation.images import subset
from diffusion.experiment import build
from diffusion.experiment.schema import KEYS
from diffusion.reporting import page
from diffusion.runtime import devices, files
from diffusion.variances import X0Variance
from experiments import commands, drawn, tables
from experiments.drawn import METRICS, REAL, Study
from experiments.variance_accounting import estimate_x0_terms

FILE = "steps"
VARIANCES = ("fixed_small", "fixed_large", "optimal", "model")
WITHOUT_VARIANCE = ("ddim", "dpm_solver_pp", "dpm_solver_pp(eta=1)", "unipc", "heun", "heun(s_churn=40)")
# The respaced process of the bound is evenly spaced and unguided, whatever the run samples with.
OF_BOUND = ("sample.grid", "sample.guidance", "sample.guide", "sample.guidance_interval")
PLAIN = {name: KEYS[name].default for name in OF_BOUND}


class Way(NamedTuple):
    """A way of sampling: the method, its variance if it uses one, and the number of steps."""

    method: str
    variance: str
    num_steps: int

    @property
    def changes(self) -> dict[str, Any]:
        """The config keys for this way of sampling."""
        return PLAIN | {
            "sample.method": self.method,
            "sample.variance": self.variance or "model",
            "sample.num_steps": self.num_steps,
        }


def main() -> None:
    """Runs the command line."""
    parser = drawn.argument_parser(__doc__)
    parser.add_argument("--steps", default="5,10,25,50", help="comma-separated numbers of steps")
    parser.add_argument("--num_scored", type=int, default=299, help="test images whose bits/dim are computed")
    arguments = vars(parser.parse_args())
    steps, num_scored = arguments.pop("steps"), arguments.pop("num_scored")
    steps = commands.numbers(steps, "--steps", int, least=1)
    if num_scored < 2:
        raise ValueError(f"--num_scored={num_scored} must be at least 2, for a standard error")
    run(drawn.study(FILE, **arguments), steps, num_scored)


def run(study: Study, steps: list[int], num_scored: int) -> None:
    """Draws and scores samples in every way; prints and saves the results."""
    config, directory = study.trained.config, study.directory
    if config.model.variance == "learned":
        needed = "take a run with model.variance=learned_range"
        raise ValueError(f"model.variance='learned' is that of single steps, and here steps are left out; {needed}")
    train_set, test_set = (build.load_data(config, split) for split in ("train", "test"))
    for num_steps in steps:
        schedules.evenly_spaced(study.trained.model.schedule, num_steps)  # raises before anything is sampled
    numbers = subset(len(test_set), min(num_scored, len(test_set)))
    few = subset(len(train_set), min(num_scored, len(train_set)))
    terms = estimate_x0_terms(config, study.trained.model, train_set, few)
    x0_variance = X0Variance.over_images(terms.analytic)

    rows = []
    for way in ways_of(config.model.variance, steps):
        row = way._asdict() | study.scores(study.images(way.changes, x0_variance))
        if way.variance:
            row |= respaced_bpd(study, way, x0_variance, test_set, numbers)
        rows.append(row)
        print(*_cells(row), sep=" | ", flush=True)
    real = drawn.real_images(study, test_set)

    title = f"{config.data.name}, T = {config.schedule.num_steps}, step {study.trained.state.step} (EMA)"
    text = markdown(rows, real, study, title, len(numbers))
    files.write_text(directory / f"{FILE}.md", text)
    drawn.save_csv(directory / f"{FILE}.csv", rows)
    plot(directory / f"{FILE}.png", rows, real, study, title)
    page.refresh(directory)
    print(text)


def ways_of(own: str, steps: list[int]) -> list[Way]:
    """Every way of sampling from a model with the variance `own`, which appears only as "model"."""
    ways = [Way("ancestral", variance, n) for variance in VARIANCES if variance != own for n in steps]
    return ways + [Way(method, "", n) for method in WITHOUT_VARIANCE for n in steps]


def respaced_bpd(
    study: Study, way: Way, x0_variance: X0Variance, test_set: Source, numbers: np.ndarray
) -> dict[str, float]:
    """The bound of the respaced process, and its standard error over images."""
    trained = study.trained
    model = trained.experiment.model(trained.state.ema_params, way.variance, x0_variance)
    model = dataclasses.replace(model, schedule=schedules.evenly_spaced(model.schedule, way.num_steps))
    bound = full_bound(build.bound_settings(trained.config))(devices.replicate(model), test_set, numbers)
    summary = bound.summary("test")
    return {"bpd": summary["test_bpd"], "bpd_stderr": summary["test_bpd_stderr"]}


def _name(row: dict[str, Any], own: str = "model") -> str:
    """The row's method, and for the ancestral one its variance."""
    if not row["variance"]:
        return row["method"]
    return f"ancestral, {own if row['variance'] == 'model' else row['variance']}"


def _cells(row: dict[str, Any], own: str = "model") -> list[str]:
    bpd = f"{row['bpd']:.3f} ± {row['bpd_stderr']:.3f}" if "bpd" in row else "–"
    return [_name(row, own), str(row["num_steps"]), *(drawn.cell(row, metric, 3) for metric in METRICS), bpd]


def _less_own(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The distance minus that of the ancestral sampler with the model's own variance and as many steps, by set."""
    own = Way("ancestral", "model", row["num_steps"])._asdict()
    base = next((other for other in rows if own.items() <= other.items()), None)
    return "–" if base is None or row is base else drawn.less(row, base, METRICS[0], 3)


def markdown(
    rows: list[dict[str, Any]], real: dict[str, Any], study: Study, title: str, num_scored: int
) -> str:
    """The table, and how samples were compared."""
    own = study.trained.config.model.variance
    columns = ["sampler, variance", "steps", "Fréchet distance", f"less ancestral, {own}"]
    columns += ["precision", "recall", "bits/dim"]
    cells = [_cells(row, own) for row in rows]
    cells.append([REAL, "–", *(drawn.cell(real, metric, 3) for metric in METRICS), "–"])
    differences = [*(_less_own(row, rows) for row in rows), "–"]
    cells = [[*cell[:3], less, *cell[3:]] for cell, less in zip(cells, differences, strict=True)]
    lines = [
        f"# Samplers and steps: {title}",
        "",
        drawn.protocol(study, PLAIN, Way._fields)
        + f" Bits/dim: of the respaced process, {num_scored} test images, ± one standard error over images. The "
        "optimal variance is Analytic-DPM's, σ* from training images.",
        "",
        tables.markdown(columns, cells),
        drawn.provenance(),
    ]
    return "\n".join(lines) + "\n"


def plot(
    path: Path, rows: list[dict[str, Any]], real: dict[str, Any], study: Study, title: str
) -> None:
    """Plots the Fréchet distance and the bits/dim against the number of steps, a line for each way of sampling."""
    own = study.trained.config.model.variance
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    distance, bits = figure.subplots(1, 2)
    names = list(dict.fromkeys(_name(row, own) for row in rows))
    for number, name in enumerate(names):
        of_name = [row for row in rows if _name(row, own) == name]
        style = {"color": f"C{number}", "marker": "o", "capsize": 3, "linestyle": "-" if "," in name else "--"}
        for axes, key in ((distance, "frechet_distance"), (bits, "bpd")):
            if key in of_name[0]:
                steps = [row["num_steps"] for row in of_name]
                axes.errorbar(steps, *_values(of_name, key), label=name, **style)
    distance.axhline(np.mean(real["frechet_distance"]), color="gray", linestyle=":", label=REAL)
    distance.set(ylabel=f"Fréchet distance ({study.features})", yscale="log")
    bits.set(ylabel="bits/dim of the respaced process", yscale="log")
    for axes in (distance, bits):
        axes.set(xlabel="steps", xscale="log")
        steps = sorted({row["num_steps"] for row in rows})
        axes.set_xticks(steps, labels=map(str, steps))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.minorticks_off()
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="x-small", loc="upper right", ncols=2)
    figure.savefig(path, dpi=120)


def _values(rows: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """The plotted values and their errors: half the interval over sets, or one standard error over images."""
    if key == "bpd":
        return [row["bpd"] for row in rows], [row["bpd_stderr"] for row in rows]
    return drawn.curve(rows, key)


if __name__ == "__main__":
    commands.exit_with(main)
