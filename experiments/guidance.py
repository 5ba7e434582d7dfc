"""What does guidance buy? The Fréchet distance, precision, recall and recognised classes for several weights w.

    python -m experiments.guidance --workdir=runs/digits_conditional [--weights=0,0.5,1,2,4] [--features=classifier]

Nothing is trained but the classifier of the data's labels, if there is none yet (--mode=classifier). The run must be of
a config with model.conditional and model.label_dropout. Leaves guidance.md, .csv and .png and guidance_samples.png in
the working directory, and the samples in its folder guidance/, so that a call that was stopped goes on.
"""

import argparse
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure

from diffusion.data import Source
from diffusion.evaluation import classifier
from diffusion.evaluation.classifier import Trained
from diffusion.experiment import build, workdir
from diffusion.reporting import page, pictures
from experiments import drawn
from experiments.drawn import METRICS, REAL, Study

FILE = "guidance"
UNCONDITIONAL = -1.0  # the weight that leaves the labels out
SHOWN = 8  # images of each class


def main() -> None:
    """The command; what is wrong with its input prints a one-line error, with exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="of a run with labels; gets the results")
    parser.add_argument("--weights", default="0,0.25,0.5,1,2,4", help="w, with commas between them")
    parser.add_argument("--features", default="classifier", help="a value of quality.features")
    parser.add_argument("--num_images", type=int, default=1000, help="samples of each weight and seed")
    parser.add_argument("--num_seeds", type=int, default=3, help="of the samples")
    parser.add_argument("--checkpoint", default="latest", help="latest, best or a step")
    arguments = parser.parse_args()
    try:
        weights = [float(weight) for weight in arguments.weights.split(",")]
        run(
            arguments.workdir, weights, arguments.features, arguments.num_images, arguments.num_seeds,
            arguments.checkpoint,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        parser.error(str(error))


def run(
    directory: Path, weights: list[float], features: str, num_images: int, num_seeds: int, checkpoint: str = "latest"
) -> None:
    """Draws and scores samples for every weight; prints and saves the results."""
    config = workdir.read_config(directory)
    if not config.model.label_dropout:
        raise ValueError(f"{directory} knows no images without labels: train with model.label_dropout > 0")
    train_set, test_set = (build.load_data(config, split) for split in ("train", "test"))
    judge = _classifier(train_set, test_set, config.seed)
    study = drawn.study(directory, FILE, checkpoint, features, num_images, num_seeds)
    rows, shown = [], {}
    for weight in [UNCONDITIONAL, *weights]:
        images = study.images({"sample.guidance": weight, "sample.labels": (), "sample.guidance_interval": ()})
        rows.append({"w": weight} | study.scores(images) | recognised(judge, images, weight))
        shown[weight] = images[0]
    right = judge.outputs(test_set.images())[1].argmax(axis=1) == test_set.labels()
    real = drawn.real_images(study, test_set) | {"accuracy": float(right.mean())}

    text = markdown(rows, real, study, features, judge, f"{config.data.name}, step {study.trained.state.step} (EMA)")
    (directory / f"{FILE}.md").write_text(text)
    drawn.save_csv(directory / f"{FILE}.csv", rows)
    plot(directory / f"{FILE}.png", rows, real, features)
    save_samples(directory / f"{FILE}_samples.png", shown, study)
    page.refresh(directory)
    print(text)


def _classifier(train_set: Source, test_set: Source, seed: int) -> Trained:
    """The data's classifier of --mode=classifier, trained now if there is none."""
    path = classifier.path_of(train_set.sha256())
    if not path.exists():
        classifier.save(classifier.train(train_set, test_set, seed), path)
    return classifier.load(path)


def recognised(judge: Trained, images: list[UInt8[np.ndarray, "n h w c"]], weight: float) -> dict[str, float]:
    """The part of the samples that the classifier takes for their label; none for samples that had no label."""
    if weight == UNCONDITIONAL:
        return {}
    num_classes = judge.facts.num_classes
    labels = np.arange(len(images[0])) % num_classes
    found = [float((judge.outputs(of_seed)[1].argmax(axis=1) == labels).mean()) for of_seed in images]
    return drawn.spread({"accuracy": found})


def markdown(
    rows: list[dict[str, float]], real: dict[str, float], study: Study, features: str, judge: Trained, title: str
) -> str:
    """The table with what was compared and how."""
    lines = [
        f"# Guidance: {title}",
        "",
        "ε = (1 + w) ε_c − w ε_u: w = 0 is the conditional model, w = −1 its unconditional half. "
        + drawn.protocol(study, features)
        + " Accuracy: the part of the samples that a classifier takes for the label they were drawn with; "
        f"it is right for {100 * judge.facts.test_accuracy:.1f}% of the test images.",
        "",
        "| w | Fréchet distance | precision | recall | accuracy |",
        "|---|---|---|---|---|",
    ]
    for row in [*rows, {"w": REAL} | real]:
        name = row["w"] if row["w"] == REAL else f"{row['w']:g}"
        numbers = [drawn.plus_minus(row, metric, 3) for metric in (*METRICS, "accuracy")]
        lines.append(f"| {name} | {' | '.join(numbers)} |")
    return "\n".join([*lines, "", drawn.provenance()]) + "\n"


def plot(path: Path, rows: list[dict[str, float]], real: dict[str, float], features: str) -> None:
    """Every number over w, beside that of the test images."""
    guided = [row for row in rows if row["w"] != UNCONDITIONAL]
    w = [row["w"] for row in guided]
    figure = Figure(figsize=(9, 4), layout="constrained")
    distance, parts = figure.subplots(1, 2)
    for axes, names in ((distance, METRICS[:1]), (parts, (*METRICS[1:], "accuracy"))):
        for number, name in enumerate(names):
            color, label = f"C{number}", name.replace("_", " ").replace("frechet", "Fréchet")
            axes.errorbar(w, *_curve(guided, name), fmt="o-", color=color, capsize=3, label=label)
            axes.axhline(real[name], color=color, linestyle=":")
        axes.set_xlabel("guidance w")
        axes.grid(alpha=0.3)
        axes.legend(title="dotted: test images", fontsize="small")
    distance.set(ylabel=f"Fréchet distance ({features})", ylim=(0, None))
    parts.set(ylim=(0, 1.02))
    figure.savefig(path, dpi=120)


def _curve(rows: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    return [row[name] for row in rows], [np.nan_to_num(row[f"{name}_spread"]) for row in rows]


def save_samples(path: Path, shown: dict[float, UInt8[np.ndarray, "n h w c"]], study: Study) -> None:
    """The first samples of every weight but the unconditional one, a row for each class."""
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
    main()
