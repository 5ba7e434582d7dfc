"""Training: from a config and a working directory to checkpoints, then pictures and bits per dimension.

What a run needs to go on is its config.json and its latest checkpoint: the same command resumes by itself.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import SupportsFloat

import jax
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion import (
    build,
    data,
    evaluate,
    memory,
    nonfinite,
    parallel,
    plots,
    processes,
    randomness,
    report,
    sample,
    schedules,
    timesteps,
    workdir,
)
from diffusion.build import Experiment
from diffusion.checkpoint import Checkpoints
from diffusion.data import ImageSet
from diffusion.nonfinite import LAST_GOOD
from diffusion.preemption import Preempted, Preemption
from diffusion.state import TrainState
from diffusion.step import groups, losses, to_unit
from diffusion.watchdog import Watchdog

MONITORED_IMAGES = 256  # how many test images' loss is followed during training, if as many are to be scored


def run(config: ConfigDict, directory: Path) -> None:
    """Trains to config.train.num_steps, resuming if `directory` holds a part of this run; then samples and scores.

    Raises:
        ValueError, OSError: what does not fit or is missing, in one sentence and before any compilation; or what
            could not be written.
        FloatingPointError: a loss is not finite; nothing is saved after it.
        RuntimeError: the devices no longer hold the same state.
        MemoryError: a device has too little of it.
        Preempted: a signal asked to stop.
    """
    started = time.monotonic()
    parallel.check_batch_size(config.train.batch_size, config.train.grad_accum)
    described = data.describe(config.data.name, config.data.data_dir)
    experiment = build.experiment(config, described.image_shape, described.num_levels)
    evaluate.num_scored(config, described.num_test)  # or its refusal would come after the training
    workdir.check(config, directory)
    if workdir.is_finished(directory):
        print(f"{directory} holds this run, finished: see {directory / 'summary.json'}")
        return
    train_set, test_set = (data.load(config.data.name, split, config.data.data_dir) for split in ("train", "test"))
    draw_samples, evaluated = sample.sampler(experiment), experiment.with_variance(config.eval.variance)

    with Preemption() as preemption, workdir.owned(config, directory) as directory, memory.explained(experiment):
        with Checkpoints(directory / "checkpoints", keep=config.train.keep_checkpoints) as checkpoints:
            state = resume(experiment, checkpoints)
            state = train(experiment, directory, state, train_set, test_set, checkpoints, draw_samples, preemption)

        plots.plot_loss(report.read_metrics(directory), directory / "loss.png")
        sample.save(experiment, directory, *draw_samples(parallel.replicate(state.ema_params)))
        if experiment.schedule_params:
            _plot_schedule(experiment, directory, state)
        summary = evaluate.score(evaluated, directory, state, train_set, test_set)
        summary["seconds"] = time.monotonic() - started
        report.write_json(
            directory / "summary.json", summary | {"device": report.device_name(), "versions": report.versions()}
        )
    if processes.is_first():
        print("protocol: " + ", ".join(f"{name} {value}" for name, value in summary["protocol"].items()))
        print(f"test {summary['test_bpd']:.4f} bits/dim; see {directory / 'summary.json'} and the pictures beside it")


def resume(experiment: Experiment, checkpoints: Checkpoints) -> TrainState:
    """The state to go on from, or the initial one: what the first process reads, on every process."""
    state = experiment.initial_state()
    resumed = processes.on_first(lambda: checkpoints.resume(like=state))
    return processes.from_first(state if resumed is None else resumed)


def train(
    experiment: Experiment,
    directory: Path,
    state: TrainState,
    train_set: ImageSet,
    test_set: ImageSet,
    checkpoints: Checkpoints,
    draw_samples: Callable[[PyTree], tuple[np.ndarray, np.ndarray]],
    preemption: Preemption,
) -> TrainState:
    """The loop: calls the compiled step; between calls it logs, saves and draws. Returns the last state."""
    config, begin = experiment.config, int(state.step)
    if begin == config.train.num_steps:
        return state
    train_steps, test_loss = parallel.train_steps(experiment.training), _test_loss(experiment, test_set)
    images, state = parallel.replicate(train_set.images), parallel.replicate(jax.device_get(state))
    differing_replicas, watchdog = parallel.differing_replicas(), Watchdog()
    unchecked, since, steps_since = [], time.monotonic(), 0
    with (
        report.MetricsLog(directory, step=begin) as log,
        report.Progress(config.train.num_steps, initial=begin, desc="train") as progress,
        preemption.deferred(),
    ):
        for steps, indices in _calls(config, begin, len(train_set.images)):
            with watchdog.step():
                state, metrics = train_steps(state, images, indices)
                if unchecked:  # wait for the call before: one call is in flight, and the progress shown is made
                    jax.block_until_ready(unchecked[-1][1])
            unchecked.append((steps, metrics))
            progress.update(len(steps))
            steps_since += len(steps)

            step = steps[-1]
            is_last = step == config.train.num_steps
            logs, saves, draws = (
                is_last or every and step % every == 0
                for every in (config.train.log_every, config.train.checkpoint_every, config.train.sample_every)
            )
            stops = preemption.is_due() and not is_last
            row = {}
            if logs or saves or stops:
                window = parallel.unreplicate(state.window)
                on_host = [(steps, parallel.unreplicate(metrics)) for steps, metrics in unchecked]
                skipped = int(window.get("skipped", 0))
                nonfinite.check(on_host, groups(state.params), skipped, config.train.skip_nonfinite)
                unchecked = []
            if config.train.check_replicas_every and step % config.train.check_replicas_every == 0:
                _check_replicas(step, differing_replicas(state))
            if logs:
                row = _means(window)
                row["images_per_second"] = steps_since * config.train.batch_size / (time.monotonic() - since)
            if saves:
                row["test_loss"] = test_loss(state.ema_params)
                if not np.isfinite(row["test_loss"]):
                    raise FloatingPointError(f"step {step}: test_loss = {row['test_loss']}; {LAST_GOOD}")
            if row:
                log.write(step, **row)
                progress.set_postfix({name: f"{value:.3g}" for name, value in row.items()}, refresh=False)
            if draws and not is_last:
                grid = report.image_grid(draw_samples(state.ema_params)[0], experiment.num_levels)
                report.save_png(directory / f"samples_{step}.png", grid)
                log.images(step, "samples", grid)
            if (saves or stops) and processes.is_first():
                scores = {"test_loss": row["test_loss"]} if saves else {}
                checkpoints.save(step, parallel.unreplicate(state), scores)
            if stops:
                raise Preempted(f"stopped by a signal at step {step}, which is saved; the same command goes on")
            if logs:  # images_per_second is that of training: not of scoring, saving and drawing
                since, steps_since = time.monotonic(), 0
        checkpoints.wait()  # or a signal would break off the last save
    return parallel.unreplicate(state)


def _plot_schedule(experiment: Experiment, directory: Path, state: TrainState) -> None:
    """schedule.png: the learned schedule, that of the EMA parameters, beside where it started and a fixed one."""
    config = experiment.config.schedule
    title = f"{experiment.config.data.name}, T = {config.num_steps}, step {state.step}"
    curves = {
        "learned": experiment.schedule_of(state.ema_params),
        f"start: {config.start}": experiment.initial_schedule,
    }
    curves |= {"cosine": schedules.cosine(config.num_steps)} if config.start != "cosine" else {}
    plots.plot_schedules(
        directory / "schedule.png", {name: np.asarray(s.log_snr)[1:] for name, s in curves.items()}, title
    )


def _calls(config: ConfigDict, begin: int, num_examples: int) -> Iterator[tuple[range, np.ndarray]]:
    """The compiled calls still to make: the steps each one completes, and the examples it takes.

    All calls have the same number of steps, or there would be a second compilation; so that number divides
    everything that happens between calls. On the CPU it is 1: see `parallel.train_steps`.
    """
    settings = config.train
    wanted = 1 if jax.default_backend() == "cpu" else settings.steps_per_call
    between = (settings.log_every, settings.checkpoint_every, settings.sample_every, settings.check_replicas_every)
    # A run that was stopped elsewhere, where a call had fewer steps, may begin between two of ours.
    steps_per_call = math.gcd(wanted, *between, settings.num_steps, begin)
    for step in range(begin, settings.num_steps, steps_per_call):
        steps = range(step, step + steps_per_call)
        indices = [data.batch_indices(config.seed, i, settings.batch_size, num_examples) for i in steps]
        yield range(step + 1, step + steps_per_call + 1), parallel.shard_steps(np.stack(indices))


def _means(window: dict[str, np.ndarray]) -> dict[str, SupportsFloat]:
    """The metrics' means over the window's steps; `skipped` counts over the whole run."""
    count = window["count"]
    row = {name: total / count for name, total in window.items() if count and name not in ("count", "skipped")}
    return row | {name: total for name, total in window.items() if name == "skipped"}


def _check_replicas(step: int, differing: list[str]) -> None:
    if differing:
        raise RuntimeError(
            f"step {step}: the devices no longer hold the same state, {differing[0]} being the first of "
            f"{len(differing)} leaves that differ: a device may be faulty; {LAST_GOOD}"
        )


def _test_loss(experiment: Experiment, test_set: ImageSet) -> Callable[[PyTree], float]:
    """The training loss of replicated parameters on some test images, always with the same t and ε."""
    scored = experiment.config.eval.num_images or len(test_set.images)
    images = test_set.images[evaluate.subset(len(test_set.images), min(MONITORED_IMAGES, scored))]
    t_key, examples_key = jax.random.split(randomness.stream(experiment.config.seed, "monitor"))
    t = timesteps.low_discrepancy(t_key, len(images), experiment.config.schedule.num_steps)
    t = np.random.RandomState(0).permutation(np.asarray(t))  # images sorted by class must not meet t in order

    def one_batch(params, images, t, image_numbers):
        x0 = to_unit(images, experiment.num_levels)
        keys = randomness.per_item(examples_key, image_numbers)
        return losses(experiment.training, params, t, keys, x0, dropout=False)[0]

    compiled = parallel.over_devices(one_batch)

    def test_loss(replicated_params: PyTree) -> float:
        values = [
            parallel.gather(compiled(replicated_params, images[numbers], t[numbers], numbers), num_real)
            for numbers, num_real in parallel.padded_batches(len(images), experiment.config.train.batch_size)
        ]
        return float(np.concatenate(values).mean())

    return test_loss
