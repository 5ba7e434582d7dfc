"""Why learn p_θ(x_{t−1} | x_t)? The exact q(x_{t−1} | x_t) of the training images beside a trained network.

    python -m experiments.exact_posterior --workdir=runs/digits_fixed [--num_images=299] [--num_samples=128]
    python -m experiments.exact_posterior --workdir=runs/cost --base=configs/cifar10.py

Nothing is trained. Either command takes 80 seconds of CPU time, the first for configs/digits_fixed.py. Writes into the
working directory exact_posterior.json and

    exact_posterior_gap.png      the error of ε̂ per t on training and test images, and the effective number of images
    exact_posterior_samples.png  samples of both models beside their nearest training images
    exact_posterior_nearest.png  the distances to those
    exact_posterior_cost.png     time and work of one denoising step against the number of training images

With --base it needs no checkpoint. It then measures only the cost, beside an untrained network.
"""

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree, UInt8
from ml_collections import ConfigDict

from diffusion import likelihood, reverse, samplers
from diffusion.data import Source
from diffusion.evaluation.images import subset
from diffusion.evaluation.pairs import ImageTimePairs, every_t
from diffusion.evaluation.sampling import Sampler
from diffusion.exact import empirical
from diffusion.experiment import build, workdir
from diffusion.likelihood import Measure
from diffusion.model import Model
from diffusion.reporting import summary
from diffusion.runtime import devices
from diffusion.schedules import Schedule
from experiments import exact_posterior_plots as plots
from experiments.commands import argument_parser, exit_with
from experiments.sweep import Cell

NAME = "exact_posterior"
EXACT, NETWORK = plots.EXACT, plots.NETWORK
BLOCK = 500
TIMED_BATCH = 16
TIMED_RUNS = 5
SIZES = (100, 300, 1000, 3000, 10_000, 30_000, 100_000)  # numbers of training images whose cost is measured
SIZES_OF_BASE = (1000, 5000, 20_000)
# The exact posterior learns no variance. Once one training image has all the weight, its variance is β̃.
P_EXACT = reverse.make("x0", "fixed_small")


def main() -> None:
    """Runs the command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="directory of a trained run; results go there")
    parser.add_argument("--num_images", type=int, default=299, help="images of each split to score")
    parser.add_argument("--num_samples", type=int, default=128, help="samples of each model")
    parser.add_argument("--base", help="a config file: measure only the cost, with an untrained network")
    parser.add_argument("--checkpoint", default="latest", help="latest, best or a step")
    arguments = parser.parse_args()
    if arguments.base:
        run_cost(arguments.base, arguments.workdir)
    else:
        run(arguments.workdir, arguments.num_images, arguments.num_samples, arguments.checkpoint)


def run(directory: Path, num_images: int, num_samples: int, checkpoint: str = "latest") -> None:
    """Compares the exact posterior with the network in `directory`, and saves the results."""
    config = workdir.read_config(directory)
    refuse_labels(config, directory)
    train_set, test_set = (build.load_data(config, split) for split in ("train", "test"))
    if not 2 <= num_images <= min(len(test_set), len(train_set)):
        raise ValueError(f"--num_images={num_images} must be in 2…{len(test_set)}, the size of the test split")
    if num_samples < plots.SHOWN:
        raise ValueError(f"--num_samples={num_samples} must be at least {plots.SHOWN}, the number shown")
    trained = workdir.load(directory, checkpoint)
    title = _title(config, len(train_set))
    network = trained.model
    models = {EXACT: exact_model(train_set, network.schedule), NETWORK: network}

    per_t = score(config, models, [train_set, test_set], num_images)
    plots.plot_gap(directory / f"{NAME}_gap.png", per_t, len(train_set), title)

    images = {name: sample(config, model, trained.image_shape, num_samples) for name, model in models.items()}
    images["test images"] = test_set.images(subset(len(test_set), num_images))
    neighbours = {name: nearest(some, train_set.images()) for name, some in images.items()}
    plots.save_samples(directory / f"{NAME}_samples.png", images, neighbours, train_set)
    plots.plot_nearest(directory / f"{NAME}_nearest.png", neighbours, test_set.num_levels, title)

    costs = cost(network, train_set, SIZES)
    plots.plot_cost(directory / f"{NAME}_cost.png", costs, len(train_set), title)
    headline = {
        "bpd": {split: {name: of["bpd"] for name, of in scored.items()} for split, scored in per_t.items()},
        "nearest_training_image": {name: distances(*found) for name, found in neighbours.items()},
        "cost": costs,
        "step": int(trained.state.step),
    }
    _write(directory, headline | {"per_t": per_t})
    print(json.dumps(headline, indent=2, ensure_ascii=False))


def run_cost(base: str, directory: Path) -> None:
    """Times one denoising step of the exact posterior and of an untrained network."""
    config = Cell("cost", base, {}).config()
    refuse_labels(config, base)
    train_set = build.load_data(config, "train")
    experiment = build.experiment(config, train_set.image_shape, train_set.num_levels)
    untrained = experiment.model(experiment.initial_state().ema_params)
    sizes = [size for size in SIZES_OF_BASE if size < len(train_set)]
    directory.mkdir(parents=True, exist_ok=True)
    costs = cost(untrained, train_set, (*sizes, len(train_set)))
    plots.plot_cost(directory / f"{NAME}_cost.png", costs, len(train_set), _title(config, len(train_set)))
    _write(directory, {"cost": costs})
    print(json.dumps(costs, indent=2))


def refuse_labels(config: ConfigDict, source: str | Path) -> None:
    """Raises a ValueError if the network takes labels, which the exact posterior does not."""
    if config.model.conditional:
        raise ValueError(f"{source} has model.conditional=True, and the exact posterior takes no labels")


def _write(directory: Path, results: dict[str, Any]) -> None:
    made_on = {"device": summary.device_name(), "versions": summary.versions()}
    summary.write_json(directory / f"{NAME}.json", results | made_on)


def _title(config: ConfigDict, num_train: int) -> str:
    schedule = f"{config.schedule.name} schedule, T = {config.schedule.num_steps}"
    return f"{config.data.name}, {num_train:,} training images, {schedule}"


def exact_model(train_set: Source, schedule: Schedule) -> Model:
    """The exact posterior of the training images, in place of a network. Every device holds all of the images."""
    blocks = empirical.in_blocks(train_set.images(), train_set.num_levels, BLOCK)
    return Model(empirical.denoiser(blocks, schedule, P_EXACT), P_EXACT, schedule, train_set.num_levels)


def score(config: ConfigDict, models: dict[str, Model], sources: list[Source], num_images: int) -> dict[str, Any]:
    """By split and model, the error of ε̂ per t and the bound. The exact one also has its effective number of images.

    The noise is the evaluation's, the same for both models. x̂_0 is clipped as there, which helps only the network.
    """
    terms, entropies = (ImageTimePairs(of, config.seed, config.eval.batch_size) for of in (_term, _entropy))
    replicated = {name: devices.replicate(model) for name, model in models.items()}
    snr = np.exp(np.asarray(models[NETWORK].schedule.log_snr, np.float64)[1:])
    t = every_t(num_images, len(snr))

    def of_split(source: Source) -> dict[str, Any]:
        numbers = subset(len(source), num_images)
        scored, eps_mse = {}, {}
        for name, model in replicated.items():
            bpd, x0_mse = terms.all(model, source, numbers, t, f"score {source.split}, {name}")
            eps_mse[name] = x0_mse * snr
            scored[name] = {"eps_mse": _mean(eps_mse[name]), "bpd": _mean(bpd.sum(axis=1))}
        scored[NETWORK]["eps_mse_less_exact"] = _mean(eps_mse[NETWORK] - eps_mse[EXACT])
        entropy_nats = entropies.all(replicated[EXACT], source, numbers, t, f"score {source.split}, effective images")
        quantiles = np.quantile(np.exp(entropy_nats), (0.1, 0.5, 0.9), axis=0)
        scored[EXACT]["effective_images"] = dict(zip(("p10", "median", "p90"), quantiles.tolist(), strict=True))
        return scored

    return {source.split: of_split(source) for source in sources}


def _term(model: Model) -> Measure:
    return likelihood.term_and_x0_mse(model.p, model.num_levels)


def _entropy(model: Model) -> Measure:
    """The entropy of the exact posterior's weights, in nats."""
    blocks, _ = model.denoise.args

    def measure(row, x0, x_t, eps, output):
        rows = jax.tree.map(lambda leaf: leaf[None], row)
        return empirical.posterior(blocks, rows, x_t[None]).entropy_nats[0]

    return measure


def _mean(per_image: np.ndarray) -> dict[str, Any]:
    stderr = per_image.std(axis=0, ddof=1) / len(per_image) ** 0.5
    return {"mean": per_image.mean(axis=0).tolist(), "stderr": stderr.tolist()}


def sample(
    config: ConfigDict, model: Model, shape: tuple[int, int, int], num_samples: int
) -> UInt8[np.ndarray, "n h w c"]:
    """Draws ancestral samples as pixel values, from the same noise for every model."""
    return Sampler(samplers.ancestral(), shape, config.seed, config.sample.batch_size).images(model, num_samples)


def nearest(
    images: UInt8[np.ndarray, "m h w c"], train_images: UInt8[np.ndarray, "n h w c"]
) -> tuple[np.ndarray, np.ndarray]:
    """Each image's nearest training image: its number, and the root mean squared difference in pixel values."""
    flat = train_images.reshape(len(train_images), -1).astype(np.int32)
    squares = np.stack([np.mean((flat - image.reshape(-1)) ** 2, axis=1) for image in images.astype(np.int32)])
    return squares.argmin(axis=1), squares.min(axis=1) ** 0.5


def distances(index: np.ndarray, rmse: np.ndarray) -> dict[str, Any]:
    """A summary of the distances from `nearest`."""
    return {
        "mean_rmse_levels": float(rmse.mean()),
        "max_rmse_levels": float(rmse.max()),
        "identical": int(np.sum(rmse == 0)),
        "different_neighbours": len(np.unique(index)),
        "images": len(rmse),
    }


def cost(network: Model, train_set: Source, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Seconds and FLOPs per image of one denoising step, for data sets of several sizes and for the network.

    A size beyond the data set's repeats its images, as their content does not affect the cost. The exact posterior
    takes 8 N d FLOPs: three products with the data for the weights, and one for the mean.
    """
    batch, schedule = TIMED_BATCH, network.schedule
    num_elements = int(np.prod(train_set.image_shape))
    x_t = jax.random.normal(jax.random.key(0), (batch, *train_set.image_shape))
    rows = schedule[np.full(batch, schedule.num_steps // 2)]
    exact, temporary = [], 0
    for size in sizes:
        images = train_set.images(np.arange(size) % len(train_set))
        blocks = jax.device_put(empirical.in_blocks(images, train_set.num_levels, BLOCK))
        compiled = jax.jit(empirical.posterior).lower(blocks, rows, x_t).compile()
        temporary = max(temporary, compiled.memory_analysis().temp_size_in_bytes)
        exact.append(_seconds(compiled, blocks, rows, x_t) / batch)

    @jax.jit
    def forward(model, x_t, network_t):
        return model.denoise(x_t, network_t)

    with jax.default_device(jax.devices("cpu")[0]):  # accelerators do not count FLOPs before they compile
        flops = forward.lower(network, x_t, rows.network_t).cost_analysis()["flops"] / batch
    return {
        "batch": batch,
        "sizes": list(sizes),
        "exact_seconds": exact,
        "exact_flops": [8 * size * num_elements for size in sizes],
        "network_seconds": _seconds(forward, network, x_t, rows.network_t) / batch,
        "network_flops": flops,
        "images_mib": max(sizes) * num_elements / 2**20,
        "exact_temporary_mib": temporary / 2**20,
        "process_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }


def _seconds(fn: Callable, *arguments: PyTree) -> float:
    """The shortest of a few runs, so that other load on the machine matters little."""
    jax.block_until_ready(fn(*arguments))
    times = []
    for _ in range(TIMED_RUNS):
        start = time.perf_counter()
        jax.block_until_ready(fn(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    exit_with(main)
