"""Why learn p_θ(x_{t−1} | x_t)? The exact q(x_{t−1} | x_t) of the training images beside a trained network.

    python -m experiments.exact_posterior --workdir=runs/digits [--num_images=299] [--num_samples=128]
    python -m experiments.exact_posterior --workdir=runs/cost --base=configs/cifar10.py

Nothing is trained; either takes 80 seconds of CPU time, the first for the run that `make demo` leaves. Writes into the
working directory exact_posterior.json and

    exact_posterior_gap.png      the error of ε̂ per t on training and on test images, and how many images are in play
    exact_posterior_samples.png  samples of both models beside their nearest training images
    exact_posterior_nearest.png  how far those are
    exact_posterior_cost.png     time and work of one denoising step against the number of training images

With --base it needs no checkpoint: it measures only the cost, beside a network that nobody has trained yet.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree, UInt8

from diffusion import data, likelihood, process, reverse, samplers
from diffusion.data import ImageSet
from diffusion.exact import empirical
from diffusion.exact.empirical import Blocks
from diffusion.experiment import build, workdir
from diffusion.experiment.build import Experiment
from diffusion.programs import evaluate
from diffusion.reporting import metrics_log
from diffusion.runtime import randomness
from diffusion.training import devices
from diffusion.training.step import to_levels, to_unit
from experiments import exact_posterior_plots as plots
from experiments.sweep import Cell

NAME = "exact_posterior"
EXACT, NETWORK = plots.EXACT, plots.NETWORK
BLOCK = 500
TIMED_BATCH = 16
TIMED_RUNS = 5
# The posterior of a data set has no learned variance; β̃ is what is left once it is sure of its image.
P_EXACT = reverse.make("x0", "fixed_small")


def main() -> None:
    """The command; what is wrong with its input is one sentence and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="of a run with a checkpoint; gets the results")
    parser.add_argument("--num_images", type=int, default=299, help="images of either split to score")
    parser.add_argument("--num_samples", type=int, default=128, help="samples of either model")
    parser.add_argument("--base", help="a config file: measure only the cost, with an untrained network")
    arguments = parser.parse_args()
    try:
        if arguments.base:
            run_cost(arguments.base, arguments.workdir)
        else:
            run(arguments.workdir, arguments.num_images, arguments.num_samples)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def run(directory: Path, num_images: int, num_samples: int) -> None:
    """Compares the exact posterior with the network in `directory`, and saves what came out."""
    config = workdir.read_config(directory)
    train_set, test_set = (data.load(config.data.name, split, config.data.data_dir) for split in ("train", "test"))
    if not 2 <= num_images <= min(len(test_set.images), len(train_set.images)):
        raise ValueError(f"--num_images={num_images} must be in 2…{len(test_set.images)}, the size of the test split")
    if num_samples < plots.SHOWN:
        raise ValueError(f"--num_samples={num_samples} must be at least {plots.SHOWN}, which are shown")
    experiment = build.experiment(config, test_set.images.shape[1:], test_set.num_levels)
    state = workdir.restore(experiment, directory)
    experiment = experiment.with_fixed_schedule(state.ema_params)
    title = _title(experiment, len(train_set.images))

    models = denoisers(experiment)
    on_devices = _on_devices(experiment, state.ema_params, train_set.images)
    score = scorer(experiment, on_devices, models)
    per_t = {image_set.split: score(image_set, num_images) for image_set in (train_set, test_set)}
    plots.plot_gap(directory / f"{NAME}_gap.png", per_t, len(train_set.images), title)

    images = sample(experiment, on_devices, models, num_samples)
    images["test images"] = test_set.images[evaluate.subset(len(test_set.images), num_images)]
    neighbours = {name: nearest(some, train_set.images) for name, some in images.items()}
    plots.save_samples(directory / f"{NAME}_samples.png", images, neighbours, train_set)
    plots.plot_nearest(directory / f"{NAME}_nearest.png", neighbours, test_set.num_levels, title)

    costs = cost(experiment, state.ema_params, train_set.images, [100, 300, 1000, 3000, 10_000, 30_000, 100_000])
    plots.plot_cost(directory / f"{NAME}_cost.png", costs, len(train_set.images), title)
    distances = {
        name: {
            "mean_rmse_levels": float(rmse.mean()),
            "max_rmse_levels": float(rmse.max()),
            "identical": int(np.sum(rmse == 0)),
            "different_neighbours": len(np.unique(index)),
            "images": len(rmse),
        }
        for name, (index, rmse) in neighbours.items()
    }
    headline = {"bpd": {split: {k: v["bpd"] for k, v in scored.items()} for split, scored in per_t.items()}}
    headline |= {"nearest_training_image": distances, "cost": costs, "step": int(state.step)}
    _write(directory, headline | {"per_t": per_t})
    print(json.dumps(headline, indent=2, ensure_ascii=False))


def run_cost(base: str, directory: Path) -> None:
    """Times one denoising step of the exact posterior and of an untrained network."""
    config = Cell("cost", base, {}).config()
    train_set = data.load(config.data.name, "train", config.data.data_dir)
    experiment = build.experiment(config, train_set.images.shape[1:], train_set.num_levels)
    num_train = len(train_set.images)
    sizes = sorted({size for size in (1000, 5000, 20_000) if size < num_train} | {num_train})
    costs = cost(experiment, experiment.initial_state().ema_params, train_set.images, sizes)
    directory.mkdir(parents=True, exist_ok=True)
    plots.plot_cost(directory / f"{NAME}_cost.png", costs, num_train, _title(experiment, num_train))
    _write(directory, {"cost": costs})
    print(json.dumps(costs, indent=2))


def _write(directory: Path, results: dict[str, Any]) -> None:
    metrics_log.write_json(
        directory / f"{NAME}.json", results | {"device": metrics_log.device_name(), "versions": metrics_log.versions()}
    )


def _title(experiment: Experiment, num_train: int) -> str:
    config = experiment.config
    schedule = f"{config.schedule.name} schedule, T = {config.schedule.num_steps}"
    return f"{config.data.name}, {num_train:,} training images, {schedule}"


def denoisers(experiment: Experiment) -> dict[str, tuple[reverse.Reverse, Callable]]:
    """Both models by name: their reverse process, and (parameters, data) -> denoise."""
    exact = lambda params, blocks: empirical.denoiser(blocks, experiment.schedule, P_EXACT, devices.AXIS)  # noqa: E731
    network = lambda params, blocks: experiment.denoiser(params)  # noqa: E731
    return {EXACT: (P_EXACT, exact), NETWORK: (experiment.p, network)}


def _on_devices(experiment: Experiment, params: PyTree, images: UInt8[np.ndarray, "n h w c"]) -> Callable:
    """Makes fn(params, blocks, x) -> results a function of x that every device computes with its share of the data."""
    devices = jax.local_device_count()
    replicated = devices.replicate(params)
    blocks = empirical.in_blocks(images, experiment.num_levels, BLOCK, num_shards=devices)

    def on_devices(fn: Callable[..., PyTree]) -> Callable[[PyTree], PyTree]:
        compiled = devices.over_devices(fn)
        return lambda x: devices.unreplicate(compiled(replicated, blocks, devices.replicate(x)))

    return on_devices


def scorer(experiment: Experiment, on_devices: Callable, models: dict) -> Callable[[ImageSet, int], dict[str, Any]]:
    """(image set, number of images) -> for each model the error of ε̂ per t and its bound, compiled once.

    For the exact posterior also how many training images are in play. The noise is that of the evaluation, the same
    for both; x̂_0 is clipped, as there: it only helps the network.
    """
    schedule, num_levels = experiment.schedule, experiment.num_levels
    seed_key = randomness.stream(experiment.config.seed, "eval")
    snr = np.exp(np.asarray(schedule.log_snr, np.float64)[1:])

    def batch(x):
        keys = randomness.per_item(jax.random.fold_in(seed_key, x["split"]), x["numbers"])
        return to_unit(x["images"], num_levels), keys

    def terms_of(p, make):
        return lambda params, blocks, x: likelihood.vlb_terms_bpd(
            make(params, blocks), p, schedule, *batch(x), num_levels
        )

    def entropy(params, blocks: Blocks, x):
        x0, keys = batch(x)

        def at(row):
            eps = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, row.t), x0.shape[1:]))(keys)
            rows = jax.tree.map(lambda leaf: jnp.full(len(x0), leaf), row)
            x_t = jax.vmap(process.q_sample)(rows, x0, eps)
            return empirical.posterior(blocks, rows, x_t, devices.AXIS).entropy_nats

        return jax.lax.map(at, schedule[1:])

    terms = {name: on_devices(terms_of(*model)) for name, model in models.items()}
    entropies = on_devices(entropy)

    def score(image_set: ImageSet, num_images: int) -> dict[str, Any]:
        numbers = evaluate.subset(len(image_set.images), num_images)
        x = {"images": image_set.images[numbers], "numbers": numbers, "split": np.asarray(image_set.split_number)}
        scored, eps_mse = {}, {}
        for name, of_model in terms.items():
            bpd, x0_mse = (array.astype(np.float64) for array in of_model(x))
            eps_mse[name] = x0_mse * snr
            scored[name] = {"eps_mse": _mean(eps_mse[name]), "bpd": _mean(bpd.sum(axis=1))}
        scored[NETWORK]["eps_mse_less_exact"] = _mean(eps_mse[NETWORK] - eps_mse[EXACT])
        quantiles = np.quantile(np.exp(entropies(x).astype(np.float64)), (0.1, 0.5, 0.9), axis=1)
        scored[EXACT]["effective_images"] = dict(zip(("p10", "median", "p90"), quantiles.tolist(), strict=True))
        return scored

    return score


def _mean(per_image: np.ndarray) -> dict[str, Any]:
    stderr = per_image.std(axis=0, ddof=1) / len(per_image) ** 0.5
    return {"mean": per_image.mean(axis=0).tolist(), "stderr": stderr.tolist()}


def sample(experiment: Experiment, on_devices: Callable, models: dict, num_samples: int) -> dict[str, np.ndarray]:
    """Ancestral samples of both models from the same noise: grey levels, uint8 [N, H, W, C]."""
    seed_key = randomness.stream(experiment.config.seed, "sample")
    samples = {}
    for name, (p, make) in models.items():

        def draw(params, blocks: Blocks, numbers, p=p, make=make):
            keys = randomness.per_item(seed_key, numbers)
            x0, _ = samplers.ancestral(make(params, blocks), p, experiment.schedule, keys, experiment.image_shape)
            return to_levels(x0, experiment.num_levels)

        samples[name] = on_devices(draw)(np.arange(num_samples))
    return samples


def nearest(
    images: UInt8[np.ndarray, "m h w c"], train_images: UInt8[np.ndarray, "n h w c"]
) -> tuple[np.ndarray, np.ndarray]:
    """Each image's nearest training image: its number, and the root mean squared difference in grey levels."""
    flat = train_images.reshape(len(train_images), -1).astype(np.int32)
    squares = np.stack([np.mean((flat - image.reshape(-1)) ** 2, axis=1) for image in images.astype(np.int32)])
    return squares.argmin(axis=1), squares.min(axis=1) ** 0.5


def cost(
    experiment: Experiment, params: PyTree, images: UInt8[np.ndarray, "n h w c"], sizes: list[int]
) -> dict[str, Any]:
    """Seconds and FLOPs per image of one denoising step, for data sets of several sizes and for the network.

    A size beyond the data set's repeats its images: what they show costs nothing. The exact posterior's FLOPs are
    8 N d, of three products with the data for the weights and one for the mean.
    """
    schedule, batch = experiment.schedule, TIMED_BATCH
    x_t = jax.random.normal(jax.random.key(0), (batch, *experiment.image_shape))
    rows = schedule[np.full(batch, schedule.num_steps // 2)]
    forward = jax.jit(lambda params, x_t, network_t: experiment.denoiser(params)(x_t, network_t))
    with jax.default_device(jax.devices("cpu")[0]):  # accelerators do not count FLOPs before they compile
        flops = forward.lower(params, x_t, rows.network_t).cost_analysis()["flops"] / batch
    exact, temporary = [], 0
    for size in sizes:
        blocks = jax.device_put(
            empirical.in_blocks(images[np.arange(size) % len(images)], experiment.num_levels, BLOCK)
        )
        compiled = jax.jit(empirical.posterior).lower(blocks, rows, x_t).compile()
        temporary = max(temporary, compiled.memory_analysis().temp_size_in_bytes)
        exact.append(_seconds(compiled, blocks, rows, x_t) / batch)
    return {
        "batch": batch,
        "sizes": sizes,
        "exact_seconds": exact,
        "exact_flops": [8 * size * images[0].size for size in sizes],
        "network_seconds": _seconds(forward, params, x_t, rows.network_t) / batch,
        "network_flops": flops,
        "images_mib": max(sizes) * images[0].size / 2**20,
        "exact_temporary_mib": temporary / 2**20,
        "process_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }


def _seconds(fn: Callable, *arguments: PyTree) -> float:
    """The least of a few runs, so that what else the machine does counts little."""
    jax.block_until_ready(fn(*arguments))
    times = []
    for _ in range(TIMED_RUNS):
        start = time.perf_counter()
        jax.block_until_ready(fn(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
