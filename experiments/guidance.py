"""The effect of guidance: Fréchet distance, precision, recall and recognised classes for several weights w.

    python main.py --config=configs/digits_conditional.py --mode=classifier     # once
    python -m experiments.guidance --workdir=runs/digits_conditional [--weights=0,0.5,1,2,4] [--features=classifier]

Nothing is trained. The run must be of a config with model.conditional and model.label_dropout. Writes guidance.md, .csv
and .png and guidance_samples.png into the working directory. The samples go into its folder guidance/, so a stopped
call resumes.
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from matplotlib.figure import Figure

from diffusion.evaluation import features
from diffusion.evaluation.features import Features
from diffusion.experiment import build
from diffusion.experiment.schema import KEYS
from diffusion.reporting import page, pictures
from diffusion.runtime import files
from experiments import commands, drawn, tables
from experiments.drawn import METRICS, REAL, Study

FILE = "guidance"
UNCONDITIONAL = -1.0  # the weight that removes the labels' effect
SHOWN = 8  # images of each class
OF_LABELS = {"sample.guide": "", "sample.labels": (), "sample.guidance_interval": ()}


def main() -> None:
    """Runs the command line."""
    parser = drawn.argument_parser(__doc__)
    parser.add_argument("--weights", default="0,0.25,0.5,1,2,4", help="comma-separated values of w; −1 is always drawn")
    arguments = vars(parser.parse_args())
    weights = arguments.pop("weights")
    weights = checked(commands.numbers(weights, "--weights", float))
    run(drawn.study(FILE, **arguments), weights)


def checked(weights: list[float]) -> list[float]:
    """The weights. Raises a ValueError if sample.guidance cannot be one of them, or if one is always drawn."""
    for weight in weights:
        if problem := KEYS["sample.guidance"].allowed.problem(weight):
            raise ValueError(f"--weights: sample.guidance {problem}")
    if UNCONDITIONAL in weights:
        raise ValueError(f"--weights: {UNCONDITIONAL:g} is always drawn; name the others")
    return weights


def run(study: Study, weights: list[float]) -> None:
    """Draws and scores samples for every weight; prints and saves the results."""
    config, directory = study.trained.config, study.directory
    if not config.model.label_dropout:
        raise ValueError(f"{directory} has no unconditional prediction: train with model.label_dropout > 0")
    train_set, test_set = (build.load_data(config, split) for split in ("train", "test"))
    judge, test_labels = features.classifier(train_set), test_set.labels()
    rows, shown = [], {}
    for weight in [UNCONDITIONAL, *weights]:
        images = study.images({"sample.guidance": weight} | OF_LABELS)
        row = {"w": weight} | study.scores(images)
        if weight != UNCONDITIONAL:
            labels = np.arange(images[..., 0, 0, 0].size) % train_set.num_classes
            row["accuracy"] = recognised(judge, images, labels.reshape(images.shape[:2]))
        rows.append(row)
        shown[weight] = images[0]
    (accuracy,) = recognised(judge, test_set.images()[None], test_labels[None])
    real = drawn.real_images(study, test_set) | {"accuracy": accuracy}

    text = markdown(rows, real, study)
    files.write_text(directory / f"{FILE}.md", text)
    drawn.save_csv(directory / f"{FILE}.csv", rows)
    plot(directory / f"{FILE}.png", rows, real, study)
    save_samples(directory / f"{FILE}_samples.png", shown, study)
    page.refresh(directory)
    print(text)


def recognised(
    judge: Features, images: UInt8[np.ndarray, "sets n h w c"], labels: Int[np.ndarray, "sets n"]
) -> list[float]:
    """The share of each set that a classifier assigns to its labels."""
    taken_for = [judge.extract(of_set).logits.argmax(axis=1) for of_set in images]
    return [float((found == of_set).mean()) for found, of_set in zip(taken_for, labels, strict=True)]


def markdown(rows: list[dict[str, Any]], real: dict[str, Any], study: Study) -> str:
    """The table, and how samples were compared."""
    head = [
        f"# Guidance: {study.trained.config.data.name}, step {study.trained.state.step} (EMA)",
        "",
        "ε = (1 + w) ε_c − w ε_u: w = 0 is the conditional model, w = −1 has the mean of the unconditional model. "
        + drawn.protocol(study, OF_LABELS, ["guidance"])
        + " Accuracy: the share of samples that the data's classifier assigns to the label they were drawn with.",
        "",
    ]
    base = next((row for row in rows if row["w"] == 0), None)
    cells = [_cells(f"{row['w']:g}", row, base) for row in rows] + [_cells(REAL, real, None)]
    columns = ["w", "Fréchet distance", "less w = 0", "precision", "recall", "accuracy"]
    return "\n".join([*head, tables.markdown(columns, cells), drawn.provenance()]) + "\n"


def _cells(name: str, row: dict[str, Any], base: dict[str, Any] | None) -> list[str]:
    distance, *others = (drawn.cell(row, metric, 3) for metric in (*METRICS, "accuracy"))
    less = "–" if base is None or row is base else drawn.less(row, base, METRICS[0], 3)
    return [name, distance, less, *others]


def plot(path: Path, rows: list[dict[str, Any]], real: dict[str, Any], study: Study) -> None:
    """Plots every number against w, beside the test images' number."""
    guided = [row for row in rows if row["w"] != UNCONDITIONAL]
    w = [row["w"] for row in guided]
    figure = Figure(figsize=(9, 4), layout="constrained")
    distance, parts = figure.subplots(1, 2)
    for axes, names in ((distance, METRICS[:1]), (parts, (*METRICS[1:], "accuracy"))):
        for number, name in enumerate(names):
            color, label = f"C{number}", name.replace("_", " ").replace("frechet", "Fréchet")
            axes.errorbar(w, *drawn.curve(guided, name), fmt="o-", color=color, capsize=3, label=label)
            axes.axhline(np.mean(real[name]), color=color, linestyle=":")
        axes.set_xlabel("guidance w")
        axes.grid(alpha=0.3)
        axes.legend(title="dotted: test images", fontsize="small")
    distance.set(ylabel=f"Fréchet distance ({study.features})", ylim=(0, None))
    parts.set(ylim=(0, 1.02))
    figure.savefig(path, dpi=120)


def save_samples(path: Path, shown: dict[float, UInt8[np.ndarray, "n h w c"]], study: Study) -> None:
    """The first samples of every weight except the unconditional one, with a row per class."""
    experiment = study.trained.experiment
    num_classes = experiment.training.network.num_classes
    weights = [weight for weight in shown if weight != UNCONDITIONAL]
    figure = Figure(figsize=(2.2 * len(weights), 0.28 * num_classes + 0.5), layout="constrained")
    for axes, weight in zip(np.atleast_1d(figure.subplots(1, len(weights))), weights, strict=True):
        some = shown[weight][: SHOWN * num_classes]
        labels = np.arange(len(some)) % num_classes
        axes.imshow(pictures.class_grid(some, labels, experiment.training.num_levels).squeeze(), cmap="gray")
        axes.set_title(f"w = {weight:g}", fontsize="small")
        axes.axis("off")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    commands.exit_with(main)
