"""Sampling: its speed beside the diffusers pipeline, and each sampler's error by its number of steps.

    python -m benchmarks.sampling                                        # 256 images, T = 1000 (on a GPU)
    python -m benchmarks.sampling --size=small --num-images=4 --num-steps=5     # the same on a CPU
    python -m benchmarks.sampling --quality=runs/digits_fixed                  # steps against error, of a trained model

Speed: the whole chain of our ancestral sampler is one compiled program. The peer is diffusers' DDPMPipeline with the
same weights, unchanged. Quality: DDIM, DPM-Solver++ and Heun solve the same ODE, so from the same noise they all reach
the same image if the steps are small enough. The error is the distance to Heun's result with all steps of the schedule,
as a root mean square in pixel values, and as the number of correct binary digits in the range [-1, 1].
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import networks, sides, timing
from benchmarks.timing import Arm, Arms
from diffusion import samplers, schedules
from diffusion.experiment import build, workdir
from diffusion.experiment.build import Experiment
from diffusion.model import Model
from diffusion.runtime import devices, randomness
from diffusion.runtime.devices import Replicated
from experiments.commands import exit_with

ODE_SAMPLERS = ("ddim", "dpm_solver_pp", "heun")
PIPELINE = "diffusers DDPMPipeline"


def main() -> None:
    parser = sides.arguments(__doc__, "sampling")
    parser.set_defaults(rounds=3)
    parser.add_argument("--quality", type=Path, help="directory of a trained run, which is only read")
    parser.add_argument("--size", choices=networks.SIZES, default="full")
    parser.add_argument("--num-images", type=timing.count, default=256)
    parser.add_argument("--num-steps", type=timing.count, default=1000, help="steps, out of the schedule's 1,000")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    rows, ratios = (quality(args), {}) if args.quality else speed(args)
    timing.finish(args.out, vars(args) | {"quality": str(args.quality or "")}, rows, **ratios)


def speed(args) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Seconds for all images, of ours and of diffusers' pipeline."""
    has_peer = networks.has_peer(networks.diffusers)
    costs, _ = sides.measured(args, our_arms, peer_arms if has_peer else None)

    def columns(_: str, seconds: np.ndarray) -> dict[str, Any]:
        rate = timing.quartiles(args.num_images * args.num_steps / seconds)
        return {"seconds": timing.quartiles(seconds), "network evaluations/s": rate}

    seconds = {name: cost.seconds for name, cost in costs.items()}
    ratios = {"pipeline / ours": timing.best_ratio(seconds, ["ours"], [PIPELINE])} if has_peer else {}
    return timing.rows(costs, columns), ratios


def our_arms(args) -> Arms:
    params = networks.peer(args.size)[0] if networks.has_peer(networks.diffusers) else None
    experiment = build.experiment(networks.config_of(args.size, dtype=args.dtype), networks.IMAGE_SHAPE, 256)
    params = experiment.initial_state().params if params is None else params
    model = devices.replicate(spaced(experiment.model(params), args.num_steps))
    return {"ours": Arm(partial(sampler(experiment, "ancestral"), model, args.num_images))}


def peer_arms(args) -> Arms:
    module = networks.peer(args.size)[1]
    scheduler = networks.diffusers.DDPMScheduler(1000, beta_schedule="linear", variance_type="fixed_large")
    if args.dtype == "bfloat16":
        module = module.to(networks.torch.bfloat16)
    pipeline = networks.diffusers.DDPMPipeline(module, scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> None:
        pipeline(args.num_images, num_inference_steps=args.num_steps, output_type="np")

    return {PIPELINE: Arm(networks.synchronized(draw))}


def quality(args) -> list[dict[str, Any]]:
    """The error and the seconds of every ODE sampler, with fewer and fewer steps."""
    run = workdir.load(args.quality)
    all_steps = run.model.schedule.num_steps
    draws = {method: sampler(run.experiment, method) for method in ODE_SAMPLERS}
    reference = draws["heun"](devices.replicate(spaced(run.model, all_steps)), args.num_images)
    rows = []
    for num_steps in sorted({max(2, all_steps // divisor) for divisor in (1, 2, 5, 10, 20, 50, 100)}, reverse=True):
        model = devices.replicate(spaced(run.model, num_steps))
        for method, draw in draws.items():
            images = draw(model, args.num_images)
            cost = timing.in_this_process({"": Arm(partial(draw, model, args.num_images))}, args.rounds)[""]
            rms = float(np.sqrt(np.mean((images - reference) ** 2)))
            rows.append(
                {
                    "sampler": method,
                    "steps": num_steps,
                    "network evaluations": 2 * num_steps - 1 if method == "heun" else num_steps,
                    "error, pixel values": rms * (run.model.num_levels - 1) / 2,
                    "bits right": float(-np.log2(rms / 2)) if rms else "reference",
                    "seconds": timing.quartiles(cost.seconds),
                }
                | timing.load(cost)
            )
    return rows


def spaced(model: Model, num_steps: int) -> Model:
    """The model with `num_steps` of its schedule's steps."""
    return dataclasses.replace(model, schedule=schedules.evenly_spaced(model.schedule, num_steps))


def sampler(experiment: Experiment, method: str) -> Callable[[Replicated, int], np.ndarray]:
    """(replicated model, number of images N) -> images [N, H, W, C] in [-1, 1], all of them as one batch."""
    batches = devices.over_batches(chain(experiment, method))

    def draw(model: Replicated, num_images: int) -> np.ndarray:
        ((_, images),) = batches(model, np.arange(num_images), num_images)
        return images

    return draw


def chain(experiment: Experiment, method: str) -> Callable[[Model, jax.Array], jax.Array]:
    """One device's program: (model, image numbers [n]) -> images [n, H, W, C] in [-1, 1]."""
    step, seed_key = samplers.SAMPLERS[method](), randomness.stream(experiment.config.seed, "sample")

    def one_batch(model: Model, numbers: jax.Array) -> jax.Array:
        keys = randomness.per_item(seed_key, numbers)
        return samplers.sample(step, model.denoise, model.p, model.schedule, keys, experiment.image_shape)[0]

    return one_batch


if __name__ == "__main__":
    exit_with(main)
