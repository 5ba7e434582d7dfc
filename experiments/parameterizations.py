r"""How the bound becomes "predict x_0" or "predict ε": the weight per t, the effect of L_simple, and four trainings.

    python -m experiments.parameterizations --workdir=runs/parameterizations
    python -m experiments.parameterizations --workdir=runs/parameterizations --network=runs/digits_fixed --report

The study has three parts, described in docs/parameterizations.md. The first compares the weight per t of each
prediction with its closed form in SNR and with the KL itself (weights.png). The second shows how much each t
contributes to L and to L_simple, for the errors of a trained network: the run in --network=DIR, or else the first one
trained here (shares.png). The third trains ε, x_0, v and μ̃ on digits with L, where all four have the same loss, and
with L_simple, where the losses differ (training.png). Each run has a folder, and
resumes as in `sweep`. The numbers are in parameterizations.json, the tables in parameterizations.md.

Cost     8 runs of 163,905 parameters, 400 steps of 32 images: 80 seconds of CPU time each, most of it compilation.
         --seed=0,1,2 repeats them; --schedule=linear --prediction=eps,v adds some with another schedule to the same
         working directory; --set train.num_steps=2000 eval.num_images=0 trains longer and scores every image.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from diffusion import gaussian, likelihood, parameterizations, process, reverse, schedules
from diffusion.data.levels import to_unit
from diffusion.evaluation.images import subset
from diffusion.experiment import build, workdir
from diffusion.reporting import page, summary
from diffusion.runtime import files, randomness
from diffusion.schedules import Schedule
from experiments import intervals, results, sweep
from experiments.commands import exit_with
from experiments.parameterization_report import OBJECTIVES, SYMBOLS, markdown, plot_shares, plot_training, plot_weights

AXES = {
    "prediction": list(SYMBOLS),
    "objective": list(OBJECTIVES),
    "variance": ["fixed_small"],
    "schedule": ["cosine"],
    "T": ["50"],
}
BASE = "configs/digits_fixed.py"
# A network with one resolution, so that compilation takes only about as long as training.
SMALL = {
    "unet.channel_mult": "(1,)",
    "unet.attention_resolutions": "()",
    "optim.warmup_steps": "50",
    "train.num_steps": "400",
    "train.sample_every": "0",
    "eval.num_images": "100",
    "sample.num_images": "16",
}
NAMES = ("schedule", "objective", "prediction")  # identify a row of trainings
NETWORK_IMAGES = 256
MARKS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)  # the t whose weights are saved


def main(argv: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = sweep.argument_parser(__doc__)
    parser.add_argument("--schedule", default="cosine", metavar="A,B,...", help="values of schedule.name")
    parser.add_argument("--prediction", default=",".join(SYMBOLS), metavar="A,B,...", help="values of model.prediction")
    parser.add_argument("--network", type=Path, help="the run whose errors per t are shown")
    parser.add_argument("--checkpoint", default="latest", help="of --network: latest, best or a step")
    arguments = parser.parse_args(argv)
    axes = AXES | {axis: sweep.split_values(getattr(arguments, axis)) for axis in ("schedule", "prediction")}
    if unknown := [name for name in axes["prediction"] if name not in SYMBOLS]:
        raise ValueError(f"--prediction: the report has no place for {unknown[0]!r}, only for {', '.join(SYMBOLS)}")
    axes |= {"seed": sweep.seeds(arguments, ["0"])}
    cells = sweep.grid(BASE, axes, SMALL | sweep.overrides(arguments.set))
    if few := cells[0].config().eval.terms_per_image:
        raise ValueError(f"--set eval.terms_per_image={few}: an estimate has no term of each t, which this study shows")
    if not arguments.network:
        refuse_labels(cells[0].config(), "--set")
    elif not arguments.list and arguments.index is None:
        network = workdir.load(arguments.network, arguments.checkpoint)  # its errors, before the runs are made
        refuse_labels(network.config, f"--network={arguments.network}")
    code = sweep.execute(arguments, cells, lambda run: None)
    if not arguments.list and arguments.index is None:
        write(arguments.workdir, arguments.network or arguments.workdir / cells[0].name, arguments.checkpoint)
        page.refresh(arguments.workdir)
    return code


def refuse_labels(config: ConfigDict, source: str) -> None:
    """Raises a ValueError if the network whose errors per t are shown takes labels."""
    if config.model.conditional:
        raise ValueError(f"{source}: the errors per t are measured without labels, and model.conditional is True")


def write(directory: Path, network: Path, checkpoint: str = "latest") -> None:
    """Computes the weights and the shares, reads the finished runs, and writes the numbers, tables and figures."""
    shown = {
        "linear, T = 1000": schedules.linear(1000),
        "cosine, T = 1000": schedules.cosine(1000),
        "cosine, T = 50": schedules.cosine(50),
    }
    weights = {name: bound_weights(schedule) for name, schedule in shown.items()}
    checks = {name: check(schedule) for name, schedule in shown.items()}
    errors = network_errors(network, NETWORK_IMAGES, checkpoint)
    parts = shares(errors)
    runs, _ = results.read(directory)
    trained = training(runs)
    of_zero = output_of_zero()
    numbers = {
        "weights": {
            name: {f"t={t}": {k: float(w[t - 1]) for k, w in of.items()} for t in MARKS if t <= len(of["eps"])}
            for name, of in weights.items()
        },
        "largest_relative_deviation": checks,
        "network": errors.title,
        "x0_mse": errors.x0_mse.tolist(),
        "terms_nats": errors.terms_nats.tolist(),
        "weight_times_error_deviation": errors.deviation,
        "shares": {name: share.tolist() for name, share in parts.items()},
        "output_of_zero_bpd": of_zero,
        "training": trained,
    }
    summary.write_json(directory / "parameterizations.json", numbers)
    text = markdown(checks, errors.title, errors.deviation, parts, of_zero, trained)
    files.write_text(directory / "parameterizations.md", text)
    plot_weights(directory / "weights.png", weights)
    plot_shares(directory / "shares.png", errors.title, parts)
    plot_training(directory / "training.png", [row for row in trained if row["schedule"] == trained[0]["schedule"]])
    print(text)


def bound_weights(schedule: Schedule) -> dict[str, Float[np.ndarray, " t"]]:
    """w_1…w_T of each prediction for σ_t² = β̃_t, in nats per squared error."""

    def of(prediction):
        p = reverse.make(prediction, "fixed_small")
        return np.asarray(jax.vmap(lambda row: parameterizations.bound_weight(p, row))(schedule[1:]), np.float64)

    return {prediction: of(prediction) for prediction in SYMBOLS}


def check(schedule: Schedule) -> dict[str, dict[str, float]]:
    """The largest relative deviation over t > 1 of each weight from its closed form, and of losses from the KL.

    The closed forms are float64 sums of log α_t. The losses are sums over 64 elements of random x_0, ε and outputs,
    and the KL is between q(x_{t−1} | x_t, x_0) and p_θ(x_{t−1} | x_t). Both are computed in float64 and in float32.
    """
    log_alpha_bar = np.cumsum(np.float64(schedule.log_alpha))
    with np.errstate(divide="ignore"):
        snr = 1 / np.expm1(-log_alpha_bar)
    drop, beta_tilde = snr[1:-1] - snr[2:], np.float64(schedule.beta_tilde[2:])
    closed = {
        "eps": drop / snr[2:] / 2, "x0": drop / 2, "v": drop / (1 + snr[2:]) / 2, "mean": 1 / (2 * beta_tilde)
    }  # fmt: skip
    draws = np.random.default_rng(0).normal(size=(3, schedule.num_steps - 1, 64))

    def losses(prediction, dtype):
        p = reverse.make(prediction, "fixed_small")

        def one(row, x0, eps, output):
            x_t = process.q_sample(row, x0, eps)
            kl = gaussian.kl(process.q_posterior(row, x0, x_t), p(row, x_t, output, clip_x0=False).p_prev)
            return parameterizations.weighted_error(p, row, x0, x_t, eps, output).sum(), kl.sum()

        rows = jax.tree.map(lambda table: table.astype(dtype), schedule[2:])
        return (np.asarray(loss, np.float64) for loss in jax.vmap(one)(rows, *jnp.asarray(draws, dtype)))

    def largest(a, b):
        return float(np.abs(a / b - 1).max())

    deviations = {}
    for prediction, weight in bound_weights(schedule).items():
        with jax.enable_x64(True):
            exact, kl = losses(prediction, jnp.float64)
        exact32, kl32 = losses(prediction, jnp.float32)
        deviations[prediction] = {
            "weight from closed form": largest(weight[1:], closed[prediction]),
            "weighted error from KL, float64": largest(exact, kl),
            "weighted error, float32 from float64": largest(exact32, exact),
            "KL, float32 from float64": largest(kl32, kl),
        }
    return deviations


class Errors(NamedTuple):
    """The errors of a network at each t: entry t − 1 is the mean over images at t."""

    title: str
    schedule: Schedule
    x0_mse: Float[np.ndarray, " t"]  # of the unclipped x̂_0, per element, for data in [-1, 1]
    terms_nats: Float[np.ndarray, " t"]  # the bound's terms under β̃_t, per element; the decoder's first
    deviation: float  # the largest relative deviation of terms_nats from weight × x0_mse over t > 1


def network_errors(directory: Path, num_images: int, checkpoint: str = "latest") -> Errors:
    """The errors of a run's EMA parameters on test images, one ε per image and t."""
    run = workdir.load(directory, checkpoint)
    config = run.config
    test_set = build.load_data(config, "test")
    numbers = subset(len(test_set), min(num_images, len(test_set)))
    keys = randomness.per_item(randomness.stream(config.seed, "eval"), jnp.asarray(numbers))
    model = run.experiment.model(run.state.ema_params, variance="fixed_small")
    schedule = model.schedule

    @jax.jit
    def score(model, images):
        x0 = to_unit(images, model.num_levels)
        return likelihood.vlb_terms_bpd(
            model.denoise, model.p, model.schedule, x0, keys, model.num_levels, clip_x0=False
        )

    terms, x0_mse = score(model, test_set.images(numbers))
    terms, x0_mse = (np.asarray(array, np.float64).mean(axis=0) for array in (terms, x0_mse))
    terms *= np.log(2)
    title = (
        f"{config.data.name}, {config.model.prediction}-prediction trained with {config.objective.name} for "
        f"{int(run.state.step):,} steps, {len(numbers)} test images"
    )
    deviation = np.abs(bound_weights(schedule)["x0"] * x0_mse / terms - 1)[1:].max()
    return Errors(title, schedule, x0_mse, terms, float(deviation))


def shares(errors: Errors) -> dict[str, Float[np.ndarray, " t"]]:
    """The fraction of L, and of each prediction's L_simple, that each t contributes for the same x̂_0."""

    def of_output(prediction):
        p = reverse.make(prediction, "fixed_small")
        slope = jax.vmap(lambda row: parameterizations.x0_per_output(p, row))(errors.schedule[1:])
        return errors.x0_mse / np.float64(slope) ** 2

    parts = {"L": errors.terms_nats} | {prediction: of_output(prediction) for prediction in SYMBOLS}
    return {name: part / part.sum() for name, part in parts.items()}


def output_of_zero() -> dict[str, float]:
    """The bound in bits/dim of a network that outputs 0, as an untrained one about does, by prediction.

    The test images, the schedule and the variance are those of the trainings; unclipped, as L is in training.
    """
    config = sweep.Cell("base", BASE, {}).config()
    test_set = build.load_data(config, "test")
    schedule = schedules.SCHEDULES[AXES["schedule"][0]](int(AXES["T"][0]))
    x0 = to_unit(jnp.asarray(test_set.images()), test_set.num_levels)
    keys = jax.random.split(jax.random.key(0), len(test_set))

    def zero(x_t, network_t):
        return jnp.zeros_like(x_t)

    @functools.partial(jax.jit, static_argnums=0)
    def terms(p, x0):
        return likelihood.vlb_terms_bpd(zero, p, schedule, x0, keys, test_set.num_levels, clip_x0=False)[0]

    def bpd(prediction):
        per_image = terms(reverse.make(prediction, "fixed_small"), x0).sum(axis=1)
        return float(per_image.mean())

    return {prediction: bpd(prediction) for prediction in SYMBOLS}


def training(runs: list[results.FinishedRun]) -> list[dict[str, Any]]:
    """A row per schedule, prediction and objective: bits/dim by seed, its parts, and its differences to v by seed."""
    rows = results.rows(runs)[0]
    by_names = {tuple(row.setting[axis] for axis in NAMES): row for row in rows}
    if len(by_names) < len(rows):
        settings = "; ".join(", ".join(f"{key}={value}" for key, value in row.setting.items()) for row in rows)
        raise ValueError(f"runs that differ in more than {', '.join(NAMES)} and seed share no table: {settings}")
    table = []
    for (schedule, objective, prediction), row in by_names.items():
        v = by_names.get((schedule, objective, "v"))
        table.append(
            {
                "schedule": schedule,
                "prediction": prediction,
                "objective": objective,
                "seeds": len(row.bpd),
                "test_bpd": row.mean("test_bpd"),
                "test_bpd_stderr": row.stderr_bpd,
                "test_bpd_by_seed": list(row.bpd.values()),
                "decoder_bpd": row.mean("test_decoder_bpd"),
                "kl_bpd": row.mean("test_kl_bpd"),
                "less_v_by_seed": list(intervals.paired(row.bpd, v.bpd).values()) if v else [],
                "terms_bpd": np.mean([run.terms_bpd for run in row.of_seeds.values()], axis=0).tolist(),
                "steps": row.runs[0].config["train.num_steps"],
                "images": len(row.runs[0].image_bpd),
            }
        )
    order = list(SYMBOLS)

    def place(entry: dict[str, Any]) -> tuple[str, bool, int]:
        return entry["schedule"], entry["objective"] != "vlb", order.index(entry["prediction"])

    return sorted(table, key=place)


if __name__ == "__main__":
    exit_with(main)
