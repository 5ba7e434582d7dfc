"""The training loop: it calls the compiled step, and logs, saves and samples between calls."""

import collections
import math
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import NoReturn, SupportsFloat

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from diffusion import timesteps
from diffusion.data import Source, batch_indices
from diffusion.data.levels import to_unit
from diffusion.reporting.metrics_log import MetricsLog
from diffusion.reporting.progress import Progress
from diffusion.runtime import devices, prefetch, processes, randomness
from diffusion.runtime.checkpoint import Checkpoints
from diffusion.runtime.devices import Replicated
from diffusion.runtime.nonfinite import LAST_GOOD
from diffusion.runtime.preemption import Preempted, Preemption
from diffusion.runtime.ranking import VAL_LOSS
from diffusion.runtime.watchdog import Watchdog
from diffusion.training import checks, parallel
from diffusion.training.bookkeeping import groups
from diffusion.training.clock import Clock
from diffusion.training.parallel import Batch
from diffusion.training.plan import Plan
from diffusion.training.step import Examples, Training, TrainState, mean_loss

Monitor = Callable[[Replicated], dict[str, float]]  # of EMA parameters
AT_1 = 0.125  # the share of the monitored images at t = 1, of which there would be none or too many by chance
# (EMA parameters, whether to stop, asked between batches) -> metrics of samples; None if it was stopped
Quality = Callable[[Replicated, Callable[[], bool]], dict[str, float] | None]
# (step, EMA parameters, whether to stop, asked between batches; only if not shown before) -> whether it was not stopped
Draw = Callable[[int, Replicated, Callable[[], bool], bool], bool]


def train(
    training: Training,
    plan: Plan,
    state: TrainState,
    train_set: Source,
    on_devices: bool,
    monitor: Monitor,
    is_over: Callable[[int], bool],
    draw: Draw,
    quality: Quality,
    checkpoints: Checkpoints,
    log: MetricsLog,
    preemption: Preemption,
) -> TrainState:
    """Trains from `state` to plan.num_steps, or until `is_over`, and returns the last state.

    Args:
        training, plan: the definition of a step, and the steps at which something happens.
        state: on the host.
        train_set: the training images.
        on_devices: whether every device keeps all images. Otherwise they are read from disk while a step runs.
        monitor: measures EMA parameters on validation images; its val_loss ranks the checkpoints.
        is_over: (step) -> whether training ends there. It is called after the row of each validation is written.
        draw: shows samples of EMA parameters, after the step's save. If a signal stops it, the resumed run shows them.
        quality: measures samples of EMA parameters, before the step's save; see `draw`.
        checkpoints, log: the place where process 0 saves, and the receiver of the rows.
        preemption: says when a signal asks to stop.

    Raises:
        FloatingPointError: a loss is NaN or Inf; nothing is saved after it.
        RuntimeError: the devices no longer hold the same state.
        Preempted: a signal asked to stop; the state is saved.
    """
    begin, group_names = int(state.step), groups(state.params)
    train_steps, differing_replicas = parallel.train_steps(training, plan.seed), parallel.differing_replicas()
    batches, state = _batches(training, plan, begin, train_set, on_devices), devices.replicate(state)
    watchdogs, clock, unchecked = collections.defaultdict(Watchdog), Clock(training.batch_size, begin), []
    with Progress(plan.num_steps, initial=begin, desc="train") as progress, preemption.deferred(), closing(batches):
        measured = monitor, quality, log, progress, preemption.is_due
        if _catch_up(training, plan, begin, state, checkpoints, draw, *measured) and is_over(begin):
            return state.host()
        for steps, batch in batches:
            # What is timed is this call's start and the end of the one before, so their lengths tell what is usual.
            with watchdogs[len(steps), len(unchecked[-1][0]) if unchecked else 0].step():
                before = unchecked[-1][1] if unchecked else None
                state, metrics = _called(train_steps, state, batch, len(steps), before, progress, clock)
                if before:  # wait for the call before: one call is in flight, and the progress shown is made
                    before.wait()
            unchecked.append((steps, metrics))
            progress.update(len(steps))
            step = steps[-1]
            logs, saves = plan.is_due(step, training.log_every), plan.is_due(step, plan.checkpoint_every)
            validates = saves or plan.is_due(step, plan.validate_every)
            stops = preemption.is_due() and step < plan.num_steps
            if logs or validates or stops or plan.draws(step) or plan.measures(step):
                window = state.part(lambda state: state.window).host()
                checks.finite(unchecked, group_names, window, plan.skip_nonfinite)
                unchecked.clear()
            row = _means(window) | clock.lap(step) if logs else {}
            with clock.stopped():
                checks.replicas(plan, step, state, differing_replicas)
                stops |= not _measure(plan, step, validates, row, state, *measured)
                saves |= (ends := validates and not stops and is_over(step))
                stops = _save_and_draw(plan, step, state, row, saves, stops, checkpoints, draw, preemption.is_due)
            if stops:
                _stop(checkpoints, step)
            if ends:
                break
        processes.on_first(checkpoints.wait)  # or a signal would interrupt the last save
    return state.host()


def _called(
    train_steps: parallel.TrainSteps,
    state: Replicated,
    batch: Batch,
    length: int,
    before: Replicated | None,
    progress: Progress,
    clock: Clock,
) -> tuple[Replicated, Replicated]:
    """The state and the metrics after one call. The first call of each length compiles, so it is waited for.

    Args:
        before: the metrics of a call that may still be running and whose time counts.
    """
    if not progress.is_new(length):
        return train_steps(state, batch)
    if before is not None:
        before.wait()
    with progress.compiling(length), clock.stopped(length):
        state, metrics = train_steps(state, batch)
        metrics.wait()
    return state, metrics


def _calls(
    plan: Plan, log_every: int, begin: int, batch_size: int, num_examples: int
) -> Iterator[tuple[range, np.ndarray]]:
    """The compiled calls still to make: the steps after each, and the examples that it takes, [steps, B]."""
    step = begin
    while step < plan.num_steps:
        before = range(step, step + plan.call_length(step, log_every))
        taken = [batch_indices(plan.seed, number, batch_size, num_examples) for number in before]
        step = before.stop
        yield range(before.start + 1, step + 1), np.stack(taken)


def _batches(
    training: Training, plan: Plan, begin: int, train_set: Source, on_devices: bool
) -> Generator[tuple[range, Batch], None, None]:
    """The steps and the batch of each call still to make. A batch is made while the calls before it run."""
    place = (parallel.resident if on_devices else parallel.streamed)(train_set, training.conditional)
    calls = _calls(plan, training.log_every, begin, training.batch_size, len(train_set))
    return prefetch.prefetched((steps, place(indices)) for steps, indices in calls)


def _write(log: MetricsLog, progress: Progress, step: int, row: dict[str, SupportsFloat]) -> None:
    """Logs a row, unless it is empty, and shows it beside the progress bar."""
    if row:
        log.write(step, **row)
        shown = {name: f"{value:.3g}" for name, value in row.items() if name != "validation_images"}
        progress.set_postfix(shown, refresh=False)


def _save(checkpoints: Checkpoints, step: int, state: Replicated, row: dict[str, SupportsFloat]) -> None:
    """Process 0 begins to save. If it cannot, or if the last save failed, every process raises the error."""
    metrics = {VAL_LOSS: row[VAL_LOSS]} if VAL_LOSS in row else {}
    processes.on_first(lambda: checkpoints.save(step, state.host(), metrics))


def _save_and_draw(
    plan: Plan,
    step: int,
    state: Replicated,
    row: dict[str, SupportsFloat],
    saves: bool,
    stops: bool,
    checkpoints: Checkpoints,
    draw: Draw,
    is_due: Callable[[], bool],
) -> bool:
    """Saves if the step or a signal asks for it, then shows samples. Returns whether a signal asks to stop."""
    if saves or stops:
        _save(checkpoints, step, state, row)
    if stops or not plan.draws(step) or draw(step, state.part(lambda state: state.ema_params), is_due, False):
        return stops
    if not saves:
        _save(checkpoints, step, state, row)
    return True


def _stop(checkpoints: Checkpoints, step: int) -> NoReturn:
    processes.on_first(checkpoints.wait)
    raise Preempted(f"stopped by a signal at step {step}, which is saved; the same command goes on")


def _measure(
    plan: Plan,
    step: int,
    validates: bool,
    row: dict[str, SupportsFloat],
    state: Replicated,
    monitor: Monitor,
    quality: Quality,
    log: MetricsLog,
    progress: Progress,
    is_due: Callable[[], bool],
) -> bool:
    """Adds the measurements of the EMA to a step's row: the validation loss, which ranks a checkpoint, and samples.

    Writes the row, unless a signal stops the part about samples. Returns whether it did.
    """
    ema_params = state.part(lambda state: state.ema_params)
    row |= monitor(ema_params) if validates else {}
    if not math.isfinite(row.get(VAL_LOSS, 0)):
        raise FloatingPointError(f"step {step}: {VAL_LOSS} = {row[VAL_LOSS]}; {LAST_GOOD}")
    if plan.measures(step):
        if (found := quality(ema_params, is_due)) is None:
            return False
        row |= found
    _write(log, progress, step, row)
    return True


def _catch_up(
    training: Training,
    plan: Plan,
    begin: int,
    state: Replicated,
    checkpoints: Checkpoints,
    draw: Draw,
    monitor: Monitor,
    quality: Quality,
    log: MetricsLog,
    progress: Progress,
    is_due: Callable[[], bool],
) -> bool:
    """Does what a signal stopped at the resumed step. Returns whether a row with a validation was missing."""
    logs = plan.is_due(begin, training.log_every)
    validates = plan.is_due(begin, plan.checkpoint_every) or plan.is_due(begin, plan.validate_every)
    # The stopped part may be one that the plan no longer has. A fork begins without a row.
    needs_row = plan.measures(begin) or ((logs or validates) and log.last_step > 0)
    is_missing = bool(begin) and processes.bool_from_first(needs_row and log.last_step != begin)
    if is_missing:
        row = _means(state.part(lambda state: state.window).host()) if logs else {}
        if not _measure(plan, begin, validates, row, state, monitor, quality, log, progress, is_due):
            _stop(checkpoints, begin)
    if begin and plan.draws(begin) and not draw(begin, state.part(lambda state: state.ema_params), is_due, True):
        _stop(checkpoints, begin)
    return is_missing and validates


def _means(window: dict[str, np.ndarray]) -> dict[str, SupportsFloat]:
    """The metrics' means over the window's steps; `skipped` counts over the whole run."""
    count = window["count"]
    row = {name: total / count for name, total in window.items() if count and name not in ("count", "skipped")}
    return row | {name: total for name, total in window.items() if name == "skipped"}


def monitor(
    training: Training,
    seed: int,
    num_steps: int,
    validation_set: Source,
    numbers: Int[np.ndarray, " n"],
    with_decoder: bool = True,
) -> Monitor:
    """The training loss of replicated parameters on these validation images, always with the same t and ε.

    Args:
        num_steps: T.
        numbers: the numbers of the images. If no image is set aside there are none, and no loss.
        with_decoder: whether t = 1 has its share of the loss even if there are fewer images than steps.
    """
    about = {"validation_images": float(len(validation_set))}
    if not len(numbers):
        return lambda params: about
    own = randomness.of_step(randomness.stream(seed, "monitor"))
    times = training.schedule.times
    at_1 = AT_1 if with_decoder and times == "every_term" else 0.0
    sampler = timesteps.TIMES[times](timesteps.low_discrepancy(at_1))
    t, weights = map(np.asarray, sampler.draw((), own.t, len(numbers), num_steps))
    order = np.random.RandomState(0).permutation(len(t))  # images sorted by class must not meet t in order
    t, weights = t[order], weights[order]

    def one_batch(params, items):
        images, labels, t, position = items
        x0, keys = to_unit(images, training.num_levels), randomness.per_item(own.examples, position)
        _, (_, losses) = mean_loss(training, params, Examples(x0, labels, t, jnp.ones(len(t)), keys), dropout=False)
        return losses

    labels = validation_set.labels(numbers) if training.conditional else None
    items = (validation_set.images(numbers), labels, t, np.arange(len(numbers)))
    batches = devices.over_batches(one_batch)

    def of_params(params: Replicated) -> dict[str, float]:
        values = [loss for _, loss in batches(params, items, training.batch_size)]
        return {VAL_LOSS: float((weights * np.concatenate(values)).mean())} | about

    return of_params
