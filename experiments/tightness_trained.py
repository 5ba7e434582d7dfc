"""One checkpoint under several likelihoods: the part of `experiments.bound_tightness` that needs a trained network."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from diffusion import gaussian, likelihood, process
from diffusion.data.levels import to_unit
from diffusion.evaluation.images import subset
from diffusion.exact import ode
from diffusion.experiment import build, workdir
from diffusion.model import Model
from diffusion.runtime import randomness
from experiments.tables import mean_and_stderr

NUM_IMAGES = 64  # test images under every likelihood
NUM_WEIGHTED = 50  # trajectories per image in the importance-weighted bound
NUM_FEW = 2  # images under the likelihoods that cost a thousand network passes per t
NUM_TRAJECTORIES = 1000
TRAJECTORIES_AT_ONCE = 250
TOLERANCE = 1e-3  # of the ODE solver, per step: far below the spread of dequantization
TRAJECTORY, DEQUANTIZATION, PROBE = range(3)  # the noise streams of an image

# Each likelihood: the data it is for, and its relation to the bits of the pixel values.
ROWS = {
    "bound": "pixel values; upper bound on −log₂ P of the reverse chain",
    "bound_unclipped": "the same, x̂_0 not clipped to [−1, 1]",
    "importance_weighted": "pixel values; upper bound on −log₂ P of the reverse chain, tighter",
    "ode_behind_decoder": "pixel values; upper bound on −log₂ P, same decoder, but x_1 has the ODE's law",
    "ode_behind_decoder_unclipped": "the same, the ODE's x̂_0 not clipped",
    "bound_dequantized": "uniformly dequantized; upper bound, chain with a Gaussian density as its decoder",
    "bound_dequantized_unclipped": "the same, x̂_0 not clipped",
    "ode_dequantized": "uniformly dequantized; the ODE's density, exact for each y",
    "ode_dequantized_unclipped": "the same, x̂_0 not clipped",
}
UNCLIPPED = "_unclipped"


def measure(directory: Path, checkpoint: str = "latest") -> dict[str, Any]:
    """Every likelihood of a checkpoint (EMA) in `directory`, in bits/dim, per image and as means.

    Raises:
        ValueError: the network needs labels, which these likelihoods do not have.
    """
    run = workdir.load(directory, checkpoint)
    config, model = run.config, run.model
    if model.takes_labels:
        if not config.model.label_dropout:
            raise ValueError(f"{directory}: model.conditional is on, and this study has no labels for the network")
        model = model.without_labels()
    test_set = build.load_data(config, "test")
    numbers = subset(len(test_set), NUM_IMAGES)
    x0 = to_unit(jnp.asarray(test_set.images(numbers)), test_set.num_levels)
    # The evaluation's keys, so that the bound equals the evaluation's.
    key = jax.random.fold_in(randomness.stream(config.seed, "eval"), test_set.split_number)
    keys = randomness.per_item(key, jnp.asarray(numbers))
    return {
        "run": str(directory),
        "step": int(run.state.step),
        "num_steps": model.schedule.num_steps,
        "image_numbers": numbers.tolist(),
        **compare(model, x0, keys),
    }


def compare(model: Model, x0: Float[Array, "b h w c"], keys: Array) -> dict[str, Any]:
    """The results of `measure` for one network and images on their pixel values, with a key per image."""
    few, few_keys = x0[:NUM_FEW], keys[:NUM_FEW]
    y = dequantized(model, x0, keys)
    per_image = {}
    # Dequantized data reach beyond [−1, 1], where a clipped x̂_0 cannot follow them.
    for clip_x0, ending in ((True, ""), (False, UNCLIPPED)):
        behind = partial(ode_behind_decoder_bpd, model, clip_x0=clip_x0)
        of_density = partial(ode_dequantized_bpd, model, clip_x0=clip_x0)
        per_image |= {
            f"bound{ending}": bound_bpd(model, x0, keys, None, clip_x0),
            f"ode_behind_decoder{ending}": jax.jit(behind)(x0, keys),
            f"bound_dequantized{ending}": bound_bpd(model, y, keys, _binned_density, clip_x0),
            f"ode_dequantized{ending}": jax.jit(of_density)(x0, keys),
        }
    log_weights = jnp.asarray(_log_weights(model, x0, keys, NUM_WEIGHTED))
    nats = likelihood.importance_weighted_nats(log_weights, NUM_WEIGHTED)[:, 0]
    per_image["importance_weighted"] = -nats / (x0[0].size * math.log(2))
    exact_trace = jax.jit(partial(ode_dequantized_bpd, model, exact=True))(few, few_keys)
    return {
        "per_image_bpd": {name: np.asarray(per_image[name], np.float64).tolist() for name in ROWS},
        "num_weighted": NUM_WEIGHTED,
        "exact_trace_bpd": np.asarray(exact_trace, np.float64).tolist(),
        "importance_weighted": importance_weighted(model, few, few_keys),
        "fraction_eps_mse": between_steps(model, x0, keys),
    }


def dequantized(model: Model, x0: Float[Array, "b h w c"], keys: Array) -> Float[Array, "b h w c"]:
    """Every image with noise that is uniform over each pixel value's bin."""
    bin_width = 2 / (model.num_levels - 1)
    return x0 + bin_width * (_uniform(keys, x0.shape[1:]) - 0.5)


def bound_bpd(model: Model, x0, keys, decoder, clip_x0: bool = True) -> Float[Array, " b"]:
    """The variational bound of each image, one ε per t; with None the decoder is the model's own."""

    @jax.jit
    def bound(model, x0, keys):
        return likelihood.bound_bpd(
            model.denoise, model.p, model.schedule, x0, keys, model.num_levels, clip_x0, decoder
        )

    return bound(model, x0, keys)


def ode_behind_decoder_bpd(model: Model, x0, keys, clip_x0: bool = True) -> Float[Array, " b"]:
    """L_0 + E[log q(x_1 | x_0) − log p(x_1)] with the chain's decoder and the ODE's p(x_1), Hutchinson's trace.

    By Jensen's inequality it is a bound on −log P(x_0) = −log ∫ p(x_1) P(x_0 | x_1) dx_1, as the variational bound is.
    """
    schedule = model.schedule
    row, start, end = schedule[1], schedule.log_snr[1], ode.lowest(schedule)
    predict = ode.eps_predictor(model.denoise, model.p, schedule, clip_x0)

    def one(x0, key):
        # The ε of t = 1 in `vlb_terms_bpd`, so that the decoder's term is the bound's own.
        eps = jax.random.normal(jax.random.fold_in(key, 1), x0.shape)
        marginal = process.q_marginal(row, x0)
        x_1 = marginal.sample(eps)
        output = model.denoise(x_1[None], row.network_t[None])[0]
        decoder = likelihood.vlb_term_bpd(model.p, row, x0, x_1, output, model.num_levels)
        trace = ode.hutchinson(_signs(key, x0.shape))
        solution = ode.solve(predict, x_1, start, end, trace, TOLERANCE)
        ratio = gaussian.log_prob(marginal, x_1).sum() - solution.log_prob_nats
        return decoder + ratio / (x0.size * math.log(2))

    return jax.vmap(one)(x0, keys)


def ode_dequantized_bpd(model: Model, x0, keys, exact: bool = False, clip_x0: bool = True) -> Float[Array, " b"]:
    """The ODE's bits of each dequantized image, by Hutchinson's trace or the exact one."""
    schedule, num_levels = model.schedule, model.num_levels
    predict = ode.eps_predictor(model.denoise, model.p, schedule, clip_x0)

    def one(image, key, uniform):
        divergence = ode.exact_divergence if exact else ode.hutchinson(_signs(key, image.shape))
        return ode.dequantized_bpd(predict, schedule, image, uniform, num_levels, divergence, TOLERANCE)

    return jax.vmap(one)(x0, keys, _uniform(keys, x0.shape[1:]))


def importance_weighted(model: Model, x0, keys) -> dict[str, Any]:
    """The bound with K trajectories for each image, in bits/dim, with its standard error over groups of K."""
    log_weights = jnp.asarray(_log_weights(model, x0, keys, NUM_TRAJECTORIES))
    nats_per_bpd = x0[0].size * math.log(2)
    counts = [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if NUM_TRAJECTORIES % k == 0]
    result = {"k": counts, "bpd": [], "stderr": []}
    for k in counts:
        groups = -np.asarray(likelihood.importance_weighted_nats(log_weights, k), np.float64) / nats_per_bpd
        result["bpd"].append(groups.mean(axis=1).tolist())
        num_groups = groups.shape[1]
        spread = (groups.std(axis=1, ddof=1) / num_groups**0.5).tolist() if num_groups > 1 else [None] * len(groups)
        result["stderr"].append(spread)
    # 1/Σ share²: the effective number of trajectories.
    share = np.asarray(jax.nn.softmax(log_weights), np.float64)
    result["effective_trajectories"] = (1 / (share**2).sum(axis=1)).tolist()
    return result


def _log_weights(model: Model, x0, keys, count: int) -> Float[np.ndarray, "images trajectories"]:
    """log p_θ/q in nats of `count` trajectories of each image."""

    @jax.jit
    def weights(model, image, keys):
        copies = jnp.broadcast_to(image[None], (len(keys), *image.shape))
        return likelihood.log_weights_nats(model.denoise, model.p, model.schedule, copies, keys, model.num_levels)

    found = []
    for image, key in zip(x0, keys, strict=True):
        trajectory_keys = jax.random.split(jax.random.fold_in(_stream(key, TRAJECTORY), 0), count)
        parts = jnp.split(trajectory_keys, count // min(TRAJECTORIES_AT_ONCE, count))
        found.append(np.concatenate([weights(model, image, part) for part in parts]))
    return np.stack(found)


def between_steps(model: Model, x0, keys) -> dict[str, list[float]]:
    """Mean squared error of ε̂ at the middle of neighbouring log-SNRs, and the mean of the errors at both ends."""
    predict = jax.vmap(ode.eps_predictor(model.denoise, model.p, model.schedule), in_axes=(0, None))
    eps = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 1), x0.shape[1:]))(keys)

    @jax.jit
    def error(log_snr):
        x = jnp.sqrt(jax.nn.sigmoid(log_snr)) * x0 + jnp.sqrt(jax.nn.sigmoid(-log_snr)) * eps
        return jnp.mean((predict(x, log_snr) - eps) ** 2)

    log_snr = np.asarray(model.schedule.log_snr)[1:]
    log_snr = log_snr[np.isfinite(log_snr)]
    at = np.asarray([error(value) for value in log_snr], np.float64)
    middle = np.asarray([error(value) for value in (log_snr[1:] + log_snr[:-1]) / 2], np.float64)
    return {"middle": middle.tolist(), "neighbours": ((at[1:] + at[:-1]) / 2).tolist()}


def means(result: dict[str, Any]) -> dict[str, tuple[float, float, float, float]]:
    """For each likelihood, the mean over images and its standard error, and both for its difference to the bound."""
    per_image = {name: np.asarray(values) for name, values in result["per_image_bpd"].items()}
    bound = per_image["bound"]
    return {name: (*mean_and_stderr(values), *mean_and_stderr(values - bound)) for name, values in per_image.items()}


def plot(path: Path, result: dict[str, Any]) -> None:
    """Left: the importance-weighted bound against K, per image. Right: the means; colours mark the kind of data."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    over_k, side_by_side = figure.subplots(1, 2)
    weighted = result["importance_weighted"]
    for image in range(NUM_FEW):
        bpd, stderr = (np.asarray(weighted[name], np.float64)[:, image] for name in ("bpd", "stderr"))
        label = f"test image {result['image_numbers'][image]}"
        over_k.errorbar(weighted["k"], bpd, 2 * np.nan_to_num(stderr), fmt="o-", markersize=3, label=label)
    over_k.set(xlabel="trajectories K", ylabel="importance-weighted bound (bits/dim)", xscale="log")
    over_k.legend(title="bars: 2 standard errors")
    names = list(ROWS)
    values = means(result)
    for y, name in enumerate(names):
        mean, stderr, difference, difference_stderr = values[name]
        color = "tab:orange" if "dequantized" in name else "tab:blue"
        side_by_side.errorbar(mean, y, xerr=2 * stderr, fmt="o", color=color)
        text = f"{mean:.3f}" if y == 0 else f"{mean:.3f} (bound {difference:+.3f} ± {difference_stderr:.3f})"
        side_by_side.annotate(text, (mean, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8)
    words = {"ode_": "ODE ", "weighted": f"weighted, K = {result['num_weighted']}", "_": " "}
    labels = [name.removesuffix(UNCLIPPED) for name in names]
    for entry, word in words.items():
        labels = [label.replace(entry, word) for label in labels]
    unclipped = [", x̂_0 unclipped" * name.endswith(UNCLIPPED) for name in names]
    labels = [f"{label}{ending}" for label, ending in zip(labels, unclipped, strict=True)]
    side_by_side.set_yticks(range(len(names)), labels, fontsize=8)
    side_by_side.set_ylim(len(names) - 0.5, -0.7)
    side_by_side.margins(x=0.35)
    side_by_side.set(xlabel=f"bits/dim, mean of {NUM_IMAGES} images ± 2 standard errors")
    side_by_side.set_title("blue: pixel values; orange: uniformly dequantized", fontsize="medium")
    for axes in (over_k, side_by_side):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _binned_density(g: gaussian.Gaussian, x: Array, num_levels: int) -> Array:
    """The density times the width of a bin, so that bits of dequantized data compare with bits of pixel values."""
    return gaussian.log_prob(g, x) + math.log(2 / (num_levels - 1))


def _stream(key: Array, which: int) -> Array:
    """A key for noise apart from the bound's, which folds t into the image's key."""
    return jax.random.fold_in(jax.random.fold_in(key, 2**31 - 1), which)


def _uniform(keys: Array, shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    return jax.vmap(lambda key: jax.random.uniform(_stream(key, DEQUANTIZATION), shape))(keys)


def _signs(key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    return jax.random.rademacher(_stream(key, PROBE), shape, jnp.float32)
