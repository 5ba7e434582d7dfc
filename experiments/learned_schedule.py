"""A learned noise schedule against the fixed one it starts from: the bound, and the variance of the training loss.

    python -m experiments.learned_schedule --workdir=runs/learned_schedule [--T=20] [--seeds=0,1,2] [--steps=600]

For each seed it trains three small networks on the digits, for equally many steps of equally many images. The first has
the fixed cosine schedule. The second has a schedule that starts there and is trained by the bound. In the third the
inner part of the schedule is trained to minimise the variance of the loss. Writes learned_schedule.json, .md and .png
into the working directory. It shows that for few steps a learned schedule has a lower bound and nearly equal KL terms.
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from ml_collections import ConfigDict

from configs import digits_fixed
from diffusion import data
from diffusion.data.source import Source, Splits
from diffusion.evaluation.bound import full_bound
from diffusion.evaluation.images import subset
from diffusion.experiment import build
from diffusion.experiment.build import Experiment
from diffusion.model import Model
from diffusion.reporting import summary
from diffusion.reporting.progress import Progress
from diffusion.runtime import devices, files
from diffusion.training import parallel
from experiments import intervals, tables
from experiments.commands import argument_parser, exit_with, numbers

FILE = "learned_schedule"
START = "cosine"
FIXED = "fixed"
ARMS = {  # schedule.name of each
    FIXED: START,
    "learned by the bound": f"learned(start={START!r}, inner='bound')",
    "learned by the variance": f"learned(start={START!r}, inner='second_moment')",
}
DIGITS_SHOWN = {"validation_bpd": 4, "test_bpd": 4, "loss_variance": 2, "kl_loss_variance": 3}


def main() -> None:
    """Runs the command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="where the results go")
    parser.add_argument("--T", type=int, default=20, help="the number of latents")
    parser.add_argument("--steps", type=int, default=600, help="training steps of 32 images each")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated seeds")
    arguments = parser.parse_args()
    run(arguments.workdir, arguments.T, arguments.steps, numbers(arguments.seeds, "--seeds", int, least=0))


def run(directory: Path, num_steps: int, train_steps: int, seeds: list[int]) -> None:
    """Trains and scores every arm and seed; prints and saves the results."""
    configs = {arm: arm_config(arm, num_steps, train_steps) for arm in ARMS}
    splits = build.load_splits(configs[FIXED])
    shape, num_levels = splits.test.image_shape, splits.test.num_levels
    # All of them first, so that an arm that cannot be trained is an error before another one is.
    experiments = {arm: build.experiment(config, shape, num_levels) for arm, config in configs.items()}
    directory.mkdir(parents=True, exist_ok=True)
    rows = []
    for arm, experiment in experiments.items():
        score = scorer(configs[arm], splits)
        for seed in seeds:
            rows.append({"arm": arm, "seed": seed, **score(train(experiment, splits.train, seed))})
            print(f"{arm}, seed {seed}: {rows[-1]['validation_bpd']:.4f} bits/dim of validation images", flush=True)
    setting = {"T": num_steps, "train_steps": train_steps, "start": START}
    setting |= {"validation_images": len(splits.validation), "test_images": len(splits.test)}
    summary.write_json(directory / f"{FILE}.json", setting | {"device": summary.device_name(), "runs": rows})
    text = markdown(rows, setting)
    files.write_text(directory / f"{FILE}.md", text)
    plot(directory / f"{FILE}.png", rows, f"digits, T = {num_steps}, {train_steps} steps, {len(seeds)} seeds")
    print(text)


def arm_config(arm: str, num_steps: int, train_steps: int) -> ConfigDict:
    """The digits' config with a network of one resolution and few channels, and the arm's schedule."""
    config = digits_fixed.get_config()
    changes = {
        "unet.channels": 16, "unet.channel_mult": (1,), "unet.attention_resolutions": (),
        "train.num_steps": train_steps, "schedule.num_steps": num_steps, "schedule.name": ARMS[arm],
    }  # fmt: skip
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


def train(experiment: Experiment, train_set: Source, seed: int) -> Model:
    """The model of the EMA parameters after training with this seed."""
    config = ConfigDict(experiment.config.to_dict() | {"seed": seed})
    train_steps = parallel.train_steps(experiment.training, seed)
    batch = parallel.resident(train_set)
    state = devices.replicate(dataclasses.replace(experiment, config=config).initial_state())
    with Progress(config.train.num_steps, desc=f"{config.schedule.name}, seed {seed}") as progress:
        for step in range(config.train.num_steps):
            indices = data.batch_indices(seed, step, config.train.batch_size, len(train_set))
            state, metrics = train_steps(state, batch(indices[None]))
            progress.update(1)
            if not np.isfinite(metrics.part(lambda metrics: metrics["loss"]).host()).all():
                raise FloatingPointError(f"the loss of seed {seed} at step {step + 1} is NaN or Inf")
    return experiment.model(state.part(lambda state: state.ema_params).host())


def scorer(config: ConfigDict, splits: Splits) -> Callable[[Model], dict[str, Any]]:
    """A function of a model: its bound on validation and test images, and the variance of its training loss."""
    bound, num_steps = full_bound(build.bound_settings(config)), config.schedule.num_steps
    train_numbers = subset(len(splits.train), len(splits.test))

    def score(model: Model) -> dict[str, Any]:
        replicated = devices.replicate(model)
        validation, test = (bound(replicated, of, np.arange(len(of))) for of in (splits.validation, splits.test))
        train = bound(replicated, splits.train, train_numbers)
        # With uniform t, an image's loss is T times its term of t (plus its prior term, which hardly varies).
        losses = num_steps * train.terms_bpd
        return {
            "validation_bpd": validation.image_bpd.mean(),
            "test_bpd": test.image_bpd.mean(),
            "decoder_bpd": test.decoder_bpd.mean(),
            "prior_bpd": test.prior_bpd.mean(),
            "train_bpd": train.image_bpd.mean(),
            "loss_variance": losses.var(),
            "kl_loss_variance": losses[:, 1:].var(),
            "loss_per_t": losses.mean(axis=0).tolist(),
            "log_snr": np.asarray(model.schedule.log_snr)[1:].tolist(),
        }

    return score


def markdown(rows: list[dict[str, Any]], setting: dict[str, Any]) -> str:
    """Means over seeds with their intervals; differences to the fixed schedule are paired by seed."""
    head = [
        f"# A learned schedule against {START}: digits, T = {setting['T']}, {setting['train_steps']} steps",
        "",
        f"Each number: {intervals.caption([len(rows) // len(ARMS)])}, on {setting['validation_images']} validation "
        f"images, for choices, and {setting['test_images']} test images, for reports; "
        "differences to the fixed schedule are paired by seed. The variance is that of one training image's loss at "
        "one uniform t: over all t, and over t > 1, the KL terms.",
        "",
    ]
    quantities = ["validation bits/dim", "test bits/dim", "variance, all t", "variance, t > 1"]
    columns = ["schedule", *itertools.chain.from_iterable((quantity, "less fixed") for quantity in quantities)]
    lines = []
    for arm in ARMS:
        cells = [arm]
        for name, digits_shown in DIGITS_SHOWN.items():
            values, fixed = ({row["seed"]: row[name] for row in rows if row["arm"] == a} for a in (arm, FIXED))
            cells.append(intervals.text(intervals.of_mean(values.values()), digits_shown))
            less = intervals.of_mean(intervals.paired(values, fixed).values())
            cells.append("–" if arm == FIXED else intervals.text(less, digits_shown, signed=True))
        lines.append(cells)
    return "\n".join([*head, tables.markdown(columns, lines)])


def plot(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Plots the learned log SNR and the loss's term of each t against t, with a line per seed."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    curves, losses = figure.subplots(1, 2)
    for i, arm in enumerate(ARMS):
        for k, row in enumerate(row for row in rows if row["arm"] == arm):
            t = np.arange(1, len(row["log_snr"]) + 1)
            style = {"color": f"C{i}", "label": arm if k == 0 else None, "linewidth": 1.2}
            curves.plot(t, row["log_snr"], **style)
            losses.semilogy(t, row["loss_per_t"], **style)
    curves.set(xlabel="t", ylabel="log SNR")
    curves.set_ylim(bottom=-12)  # below this, x_t has almost no information on x_0
    losses.set(xlabel="t", ylabel="T × the bound's term of t (bits/dim)")
    curves.legend(fontsize="small")
    for axes in (curves, losses):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    exit_with(main)
