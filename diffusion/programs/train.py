"""--mode=train: from a config and a working directory to checkpoints, samples and bits per dimension.

A run needs only its config.json and its latest checkpoint to resume, with the same command.
"""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion import schedules
from diffusion.data.source import Splits
from diffusion.evaluation import images
from diffusion.evaluation.sampling import Sampler
from diffusion.experiment import build, kept_averages, memory, names, rules, workdir
from diffusion.experiment.build import Experiment
from diffusion.experiment.ema import ema_of
from diffusion.programs import early_stopping, evaluate, fork, in_training, sample, scored
from diffusion.programs.quality import Scorer
from diffusion.reporting import loggers, page, plots, summary
from diffusion.reporting.metrics_log import MetricsLog, read_metrics
from diffusion.reporting.page.run import ending
from diffusion.reporting.summary import Stopwatch
from diffusion.runtime import processes
from diffusion.runtime.checkpoint import Checkpoints, has_begun
from diffusion.runtime.digests import tree_sha256
from diffusion.runtime.preemption import Preemption
from diffusion.runtime.verification import check_writable
from diffusion.training import loop, parallel
from diffusion.training.step import TrainState


def run(
    config: ConfigDict, directory: Path, base: str = "", allow_other_data: bool = False, forked: str = ""
) -> None:
    """Trains to config.train.num_steps, then samples and scores. Resumes if `directory` holds a part of this run.

    A finished run goes on if num_steps is larger now. A run that stopped early goes on if patience is larger or 0.
    `config.differing` says what may change.

    Args:
        base: the config file of the config, for base.json.
        forked: the run and the checkpoint from which a new run continues: see `fork`.
        allow_other_data: whether to resume even if the data set is not the one of the run's training.

    Raises:
        ValueError, OSError: something does not fit or is missing, in one line and before any compilation, or a file
            could not be written.
        FloatingPointError: a loss is NaN or Inf; nothing is saved after it.
        RuntimeError: the devices no longer hold the same state.
        MemoryError: a device has too little memory.
        Preempted: a signal asked to stop.
    """
    experiment = prepare(config, directory, forked)
    origin = processes.on_first(lambda: fork.read(experiment, forked, directory)) if forked else None
    if processes.bool_from_first(processes.is_first() and workdir.is_finished(directory, config)):
        if processes.is_first():
            how = ending(summary.read_json(directory / workdir.SUMMARY))
            print(f"{directory} holds this run, {how}: see {directory / workdir.SUMMARY}")
        return
    check_writable(directory)
    for hint in rules.hints(config) if processes.is_first() else ():
        logging.warning(hint)
    with Preemption() as preemption:
        _run(experiment, directory, base, allow_other_data, origin, preemption)


def _run(
    experiment: Experiment,
    directory: Path,
    base: str,
    allow_other_data: bool,
    origin: fork.Fork | None,
    preemption: Preemption,
) -> None:
    """`run` from where the data are read, which may take long, so that a signal ends it as any other part."""
    config = experiment.config
    with preemption.at_points():
        splits = build.load_splits(config)
    evaluate.check_labels(config, splits)
    early_stopping.check(config, len(splits.validation))
    if not allow_other_data:
        processes.on_first(lambda: check_data(config, directory, splits.sha256()))
    sampler = sample.make_sampler(experiment)
    with workdir.owned(config, directory) as directory, Stopwatch(directory / workdir.SECONDS) as stopwatch:
        if base:
            workdir.save_base(directory, base)
        processes.on_first(lambda: fork.write(origin, directory, splits.sha256()) if origin else None)

        def between_batches() -> None:
            stopwatch.tick()
            preemption.check()

        with memory.shortage_explained(experiment, num_train=len(splits.train)):
            state = train(experiment, directory, splits, sampler, preemption, stopwatch.tick)
        trained = ema_of(state)
        plots.plot_loss(read_metrics(directory), directory / "loss.png")
        model = experiment.model(state.ema_params, config.sample.variance)
        if config.sample.num_images:
            with memory.shortage_explained(experiment, "sample.batch_size"):
                sample.save(experiment, directory, model, trained, between_batches, sampler)
        if experiment.learns_schedule:
            _plot_schedule(experiment, directory, state)
        with memory.shortage_explained(experiment, "eval.batch_size"):
            model = experiment.model(state.ema_params, config.eval.variance)
            scores = evaluate.score_run(experiment, directory, model, trained, splits, between_batches)
        scores |= {"params_sha256": tree_sha256(state.params)} | _about(directory, stopwatch)
        scores |= early_stopping.of_summary(config, directory, int(state.step))
        summary.write_json(directory / workdir.SUMMARY, scores)
    if processes.is_first():
        page.refresh(directory)
        print(f"{_last_words(scores)}; see {directory / workdir.SUMMARY} and {page.NAME} beside it")


def _last_words(scores: dict[str, Any]) -> str:
    """The protocol and the bits/dim, if the run was scored, and how it ended, if early."""
    early = f"; {ending(scores)}" if workdir.STOPPED_EARLY in scores else ""
    if "test_bpd" not in scores:
        return f"trained to step {scores['step']:,} and not scored (eval.num_images=-1){early}"
    protocol = ", ".join(f"{name} {value}" for name, value in scores["protocol"].items())
    paid = scores.get("test_with_label_bpd")
    labels = f" given the labels, {paid:.4f} with the bits of the label added" if paid else ""
    # Only of a sum that was sampled is this not zero.
    error = scores.get("test_bpd_sampling_stderr")
    estimate = f", an estimate, standard error {error:.2g} against the sum of all terms" if error else ""
    return f"protocol: {protocol}\ntest {scores['test_bpd']:.4f} bits/dim{labels}{estimate}{early}"


def _about(directory: Path, stopwatch: Stopwatch) -> dict[str, Any]:
    """The entries of summary.json besides the scores."""
    origin, start = fork.origin_of(directory), summary.read_json(directory / workdir.START)
    return {
        "seconds": stopwatch.seconds(),
        "device": summary.device_name(),
        "versions": summary.versions(),
        **({"forked_from": origin} if origin else {}),
        **({"started_from": start} if start else {}),
    }


def prepare(config: ConfigDict, directory: Path, forked: str = "") -> Experiment:
    """The experiment, after all checks that need no data and no device."""
    if forked:
        fork.check_target(forked, directory)
    parallel.check_batch_size(config.train.batch_size, config.train.grad_accum)
    described = build.describe_data(config)
    experiment = build.experiment(config, described.image_shape, described.num_levels, described.num_classes)
    scored.check(config, described.num_test)
    if "optimal" in (config.eval.variance, config.sample.variance):
        raise ValueError(
            "eval.variance or sample.variance is optimal, which needs a trained mean; train with another one first, "
            "then use it in --mode=eval or --mode=sample"
        )
    kept_averages.check_training(config)
    if config.quality.every and config.quality.reference == "test":
        raise ValueError(
            f"quality.every={config.quality.every} scores samples during training, which must not see the test images "
            "of quality.reference='test'; take train or validation, or --mode=quality afterwards"
        )
    for chosen in config.train.loggers:
        loggers.check_installed(names.parse(chosen).name)
    workdir.check(config, directory)
    if not forked:
        fork.check_made(directory)
    if not forked and not has_begun(directory / "checkpoints"):
        _ = experiment.start  # or its refusal would come after the data
    return experiment


def train(
    experiment: Experiment,
    directory: Path,
    splits: Splits,
    sampler: Sampler,
    preemption: Preemption,
    after_row: Callable[[], None] | None = None,
) -> TrainState:
    """Trains to the end from the latest checkpoint in `directory`, or from the start, and returns the last state.

    Training sees no test image. It uses only the digest of the test split.
    """
    config, plan = experiment.config, build.plan(experiment.config)
    is_over = early_stopping.rule(config, directory)
    seen = [splits.train, splits.validation]
    scorer = processes.on_first(lambda: Scorer(config, seen)) if config.quality.every else None
    num_monitored = min(config.train.monitor_images, len(splits.validation))
    numbers = images.subset(len(splits.validation), num_monitored)
    about = config.seed, config.schedule.num_steps, splits.validation, numbers, config.train.monitor_decoder
    monitor = loop.monitor(experiment.training, *about)
    data_sha256, keep = processes.on_first(splits.sha256), config.train.keep_checkpoints
    settings = {"every": config.train.checkpoint_every, "keep": keep, "data_sha256": data_sha256}
    with kept_averages.AveragesKept(directory / "checkpoints", **settings) as checkpoints:
        state = resume(experiment, checkpoints)
        if is_over(int(state.step)) or _is_trained(plan, int(state.step), directory):
            return state
        logger = build.logger(config, directory, int(state.step))
        with MetricsLog(directory, int(state.step), after_row, logger) as log:
            show = in_training.shower(experiment, directory, sampler, log)
            quality_of = in_training.quality_of(experiment, sampler, scorer)
            training = experiment.training
            on_devices = processes.bool_from_first(memory.keeps_images(experiment, len(splits.train)))
            given = training, plan, state, splits.train, on_devices
            return loop.train(*given, monitor, is_over, show, quality_of, checkpoints, log, preemption)


def _is_trained(plan: loop.Plan, step: int, directory: Path) -> bool:
    """Whether a state of `step` is the last one, and no signal stopped what was measured of its samples.

    That also leaves the rest of its row to the resumed run, whose plan may measure no samples.
    """
    steps = [row["step"] for row in read_metrics(directory)]
    has_row = step in steps or not (steps or plan.measures(step))
    return step == plan.num_steps and processes.bool_from_first(has_row)


def resume(experiment: Experiment, checkpoints: Checkpoints) -> TrainState:
    """The state to resume from, or the initial one. Process 0 reads it for every process.

    It stays on the host. On a device it would take memory beside the state in training.
    """
    like = experiment.abstract_state()
    resumed = processes.on_first(lambda: checkpoints.resume(like))
    if processes.bool_from_first(resumed is None):
        if experiment.start:
            processes.on_first(lambda: _tell_start(experiment, checkpoints.directory.parent))
        return processes.from_first(jax.device_get(experiment.initial_state()))
    # Other processes need only the shapes. What config.init_from names may be gone by now.
    shaped = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
    return processes.from_first(shaped if resumed is None else resumed)


def _tell_start(experiment: Experiment, directory: Path) -> None:
    """Prints what the run takes from config.init_from, and writes start.json."""
    named, start = experiment.config.init_from, experiment.start
    print(f"init_from={named}: {start.described()}", file=sys.stderr)
    summary.write_json(directory / workdir.START, {"init_from": named, "sha256": start.sha256})


def check_data(config: ConfigDict, directory: Path, now: dict[str, str]) -> None:
    """Raises a ValueError if the run in `directory` was trained with other data; nothing is written.

    Args:
        now: the digest of each split. Checkpoints of version 0.1 do not record their training data.
    """
    with Checkpoints(directory / "checkpoints") as checkpoints:
        then = checkpoints.trained_on()
    for split, digest in now.items():
        if digest != then.get(split, digest):
            raise ValueError(
                f"the {split} split of data.name={config.data.name!r} in data.data_dir={config.data.data_dir!r} is not "
                f"the one that this run was trained with (SHA-256 {then[split][:12]} then, {digest[:12]} now); set "
                "data.data_dir to where the run's data lies, or add --allow_other_data to go on with the new data"
            )


def _plot_schedule(experiment: Experiment, directory: Path, state: TrainState) -> None:
    """schedule.png: the learned schedule, that of the EMA parameters, beside where it started and a fixed one."""
    config = experiment.config.schedule
    curves = {
        "learned": experiment.model(state.ema_params).schedule,
        "before training": experiment.start_schedule,
        "cosine": schedules.cosine(config.num_steps),
    }
    title = f"{experiment.config.data.name}, T = {config.num_steps}, step {state.step}"
    log_snr = {name: np.asarray(schedule.log_snr)[1:] for name, schedule in curves.items()}
    plots.plot_schedules(directory / "schedule.png", log_snr, title)
