"""The bound of one trained network for T = 10 … ∞: one curve γ, divided into more and more steps.

    python -m experiments.bound_by_steps --workdir=runs/digits_vdm [--T=10,100,1000,10000,inf] [--unclipped]

The network must be conditioned on γ, so that it works with every T (docs/vdm.md). Each test image takes 16 (--points)
evenly spaced u in [0, 1] with a random offset. They are the same for every T, so differences between T are paired. A
finite T uses the term of the step that contains u, and inf uses the continuous-time loss at u. x̂_0 is clipped, as in
every evaluation here, unless --unclipped is given, as in VDM's original code. Writes bound_by_steps.json and .md into
the working directory, or bound_by_steps_unclipped.json and .md.
"""

import dataclasses
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion import continuous_time, likelihood
from diffusion.data import Source
from diffusion.evaluation.images import subset
from diffusion.evaluation.pairs import ImageTimePairs
from diffusion.experiment import build, workdir
from diffusion.likelihood import Measure
from diffusion.model import Model
from diffusion.reporting import summary
from diffusion.runtime import devices, files
from diffusion.schedules import Row
from experiments import tables
from experiments.commands import argument_parser, exit_with, number

FILE = "bound_by_steps"


def main() -> None:
    """Runs the command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="directory of a trained run")
    parser.add_argument("--checkpoint", default="latest", help="latest, best or a step")
    parser.add_argument("--T", default="10,100,1000,10000,inf", help="comma-separated numbers of steps")
    parser.add_argument("--points", type=int, default=16, help="KL terms per image")
    parser.add_argument("--num_images", type=int, default=0, help="number of test images; 0: all")
    parser.add_argument("--unclipped", action="store_true", help="do not clip x̂_0 to [-1, 1]")
    arguments = parser.parse_args()
    names, clip_x0 = arguments.T.split(","), not arguments.unclipped
    run(arguments.workdir, arguments.checkpoint, names, arguments.points, arguments.num_images, clip_x0)


def run(
    directory: Path, checkpoint: str, names: list[str], points: int, num_images: int, clip_x0: bool = True
) -> None:
    """Scores every T; prints and saves the results.

    Raises:
        ValueError: `points`, `num_images` or a T is too small, or the model does not have a bound for every T.
    """
    if points < 1:
        raise ValueError(f"--points={points} must be at least 1")
    if num_images < 0 or num_images == 1:
        raise ValueError(f"--num_images={num_images} must be 0 or at least 2, for a standard error")
    steps = {name: None if name == "inf" else number(name, "--T", int, least=2) for name in names}
    loaded = workdir.load(directory, checkpoint)
    model, config = loaded.model, loaded.experiment.config
    check(model, config.model.conditioning)
    test_set = build.load_data(config, "test")
    numbers = subset(len(test_set), num_images or len(test_set))
    settings = {"seed": config.seed, "batch_size": config.eval.batch_size}

    def score(num_steps: int | None) -> Float[np.ndarray, " n"]:
        return image_bpd(model, num_steps, test_set, numbers, points, settings, clip_x0)

    bpd = {name: score(num_steps) for name, num_steps in steps.items()}
    rows = [row(name, bpd[name], bpd[names[-1]]) for name in names]
    described = {"step": int(loaded.state.step), "images": len(numbers), "points": points, "seed": config.seed}
    described |= {"clip_x0": clip_x0}
    file = FILE if clip_x0 else f"{FILE}_unclipped"
    summary.write_json(directory / f"{file}.json", described | {"device": summary.device_name(), "rows": rows})
    text = markdown(rows, names[-1], described)
    files.write_text(directory / f"{file}.md", text)
    print(text)


def check(model: Model, conditioning: str) -> None:
    """Raises a ValueError for a model that does not have a bound for every T."""
    if conditioning != "gamma":
        raise ValueError(f"model.conditioning={conditioning!r} works only for its own T; this needs gamma")
    if model.p.variance != "fixed_small" or model.p.decoder != "bayes":
        raise ValueError(
            f"model.variance={model.p.variance!r} and model.decoder={model.p.decoder!r} have no limit T → ∞; this "
            "needs fixed_small and bayes"
        )


def image_bpd(
    model: Model,
    num_steps: int | None,
    test_set: Source,
    numbers: np.ndarray,
    points: int,
    settings: dict,
    clip_x0: bool = True,
) -> Float[np.ndarray, " n"]:
    """An unbiased estimate of each image's bound with `num_steps` steps; None means T → ∞."""
    if num_steps is not None:
        model = dataclasses.replace(model, schedule=continuous_time.resampled(model.schedule, num_steps))
    num_terms = model.schedule.num_steps - 1
    offsets = np.random.RandomState(settings["seed"]).uniform(size=(len(numbers), 1))
    u = (offsets + np.arange(points)) / points
    whole = 1 + np.ceil(u * num_terms).clip(1, num_terms).astype(np.int32)
    t = (1 + u * num_terms).astype(np.float32) if num_steps is None else whole
    pairs = ImageTimePairs(partial(measure_of, clip_x0=clip_x0), **settings)
    replicated = devices.replicate(model)
    terms = pairs.all(replicated, test_set, numbers, t, f"T = {num_steps or '∞'}")
    ends = pairs.all(replicated, test_set, numbers, np.ones((len(numbers), 1), np.int32), "ends")
    return ends.sum(axis=1) + num_terms * terms.mean(axis=1)


def measure_of(model: Model, clip_x0: bool) -> Measure:
    """The KL term for t > 1, the continuous-time loss at an instant, the decoder's and prior's terms for t = 1."""
    of_term = continuous_time.term_and_x0_mse(model.p, model.num_levels, clip_x0)

    def measure(row: Row, x0: Array, x_t: Array, eps: Array, output: Array) -> Array:
        term, _ = of_term(row, x0, x_t, eps, output)
        return term + jnp.where(row.t == 1, likelihood.prior_bpd(model.schedule, x0), 0.0)

    return measure


def row(name: str, bpd: np.ndarray, last: np.ndarray) -> dict[str, float | str]:
    """The mean over images and its standard error. The difference to the last T is paired by image."""
    (mean, stderr), (less, less_stderr) = tables.mean_and_stderr(bpd), tables.mean_and_stderr(bpd - last)
    return {"T": name, "test_bpd": mean, "test_bpd_stderr": stderr, "less_last": less, "less_last_stderr": less_stderr}


def markdown(rows: list[dict], last: str, described: dict) -> str:
    """The table."""
    head = [
        f"# Bits/dim by the number of steps: step {described['step']}, {described['images']} test images",
        "",
        f"Mean ± standard error over images, {described['points']} KL terms of each; differences are paired; x̂_0 is "
        f"{'clipped' if described['clip_x0'] else 'not clipped'}.",
        "",
    ]
    cells = []
    for found in rows:
        less = f"{found['less_last']:+.4f} ± {found['less_last_stderr']:.4f}" if found["T"] != last else "–"
        cells.append([found["T"], f"{found['test_bpd']:.4f} ± {found['test_bpd_stderr']:.4f}", less])
    return "\n".join([*head, tables.markdown(["T", "bits/dim", f"less T = {last}"], cells)])


if __name__ == "__main__":
    exit_with(main)
