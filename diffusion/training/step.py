"""The pure train step: from one value of the state to the next, for the share of one device."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key, PyTree, Real, UInt8

from diffusion import post_hoc_ema, process
from diffusion.data.levels import to_unit
from diffusion.guidance import NO_LABEL
from diffusion.objectives import Objective
from diffusion.runtime import randomness
from diffusion.schedules import Row
from diffusion.timesteps import TimestepSampler
from diffusion.training import bookkeeping
from diffusion.training.schedule import TrainedSchedule


@flax.struct.dataclass
class TrainState:
    """The state of one replica. A checkpoint holds it, with digests.

    Randomness and data order follow from (seed, step) and are not part of it. `window` sums the metrics since the last
    row of metrics.jsonl, so a run that was stopped in between writes the same row as a run that was not. The entry
    `skipped` of the window, if there is one, counts over the whole run.
    """

    step: Any  # int32 []: optimizer steps taken. (Leaves may be arrays, NumPy arrays or their shapes.)
    params: PyTree
    ema_params: PyTree  # an exponential moving average of params
    opt_state: Any
    timesteps: PyTree  # what the draw of t remembers: see `timesteps.TimestepSampler`
    window: dict[str, Any]  # float32 []: sums over `count` steps
    power_ema: PyTree = ()  # power-function averages of params, if any are tracked


@dataclasses.dataclass(frozen=True)
class Training:
    """The definition of one train step, apart from the seed, the state and the data.

    Attributes:
        network: a module of `networks.NETWORKS`.
        objective: the loss of one example: see `objectives`.
        timesteps: how t is drawn; see `timesteps`.
        schedule: the forward process, which depends on the parameters if it is learned.
        optimizer: from Optax.
        ema_decay: the decay of the parameters' moving average.
        power_ema: the lengths of further averages, from which any other length is computed: see `post_hoc_ema`.
        num_levels: how many pixel values the data have.
        batch_size: images per step, over all devices.
        flip: whether half of the images are mirrored.
        conditional: whether the network is given the images' labels.
        label_dropout: the fraction of examples whose label is withheld from the network.
        log_every: the number of steps after which `state.window` starts again from zero.
        skip_nonfinite: whether an update with a NaN or Inf is skipped, and counted in the window.
        grad_accum: the number of microbatches into which a device's share is split.
        unroll: whether to unroll the loop over microbatches, for backends that are slow inside loops.
        probed: whether the objective is one of `objectives.PROBED`.
    """

    network: nn.Module
    objective: Objective
    timesteps: TimestepSampler
    schedule: TrainedSchedule
    optimizer: optax.GradientTransformation
    ema_decay: float
    num_levels: int
    batch_size: int
    flip: bool
    log_every: int
    conditional: bool = False
    label_dropout: float = 0.0
    skip_nonfinite: bool = False
    grad_accum: int = 1
    unroll: bool = False
    power_ema: tuple[float, ...] = ()
    probed: bool = False


class Examples(NamedTuple):
    """Examples of a batch with everything drawn for them: a device's share, or one microbatch of it."""

    x0: Float[Array, "b h w c"]
    labels: Int[Array, " b"] | None  # those that the network is given; None for one that takes none
    t: Real[Array, " b"]  # a real t is an instant of continuous time
    weight: Float[Array, " b"]  # of the loss, because not every t is as likely: see `TimestepSampler`
    keys: Key[Array, " b"]  # of ε and dropout


def mean_loss(
    training: Training, params: PyTree, examples: Examples, dropout: bool = True
) -> tuple[Float[Array, ""], tuple[dict[str, Float[Array, ""]], Float[Array, " b"]]]:
    """The mean of weight × loss, whose gradient is a training step. Ho et al. (2020), algorithm 1, line 5.

    Returns:
        The mean. Then the means of the loss and its parts by name, and the loss of each example without its weight.
    """
    x0, labels, t, weight, keys = examples
    own = randomness.of_example(keys)
    eps = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(own.noise)
    given = {"labels": labels} if training.conditional else {}

    def losses_at(params: PyTree, row: Row):  # a function of the rows: a learned schedule has its own gradient
        x_t = jax.vmap(process.q_sample)(row, x0, eps)  # eq. 4
        dropout_keys = own.dropout if dropout else None

        def network(x_t: Array) -> Array:
            return training.network.apply({"params": params}, x_t, row.network_t, dropout_keys, **given)

        if not training.probed:
            return jax.vmap(training.objective)(row, x0, x_t, eps, network(x_t))
        probe = jax.vmap(lambda key: jax.random.rademacher(key, x0.shape[1:], x0.dtype))(own.probe)
        output, slope = jax.jvp(network, (x_t,), (probe,))
        return jax.vmap(training.objective)(row, x0, x_t, eps, output, probe, slope)

    loss, parts = training.schedule.at_rows(losses_at, params, t)
    extra = training.schedule.extra_terms(params, keys, x0, training.num_levels)
    loss = sum(extra.values(), loss)
    means = jax.tree.map(lambda values: (weight * values).mean(), {"loss": loss} | parts | extra)
    return means["loss"], (means, loss)


def initial_state(training: Training, params: PyTree, image_shape: tuple[int, int, int]) -> TrainState:
    """The state before the first step. The EMA starts as a copy of the parameters, so it needs no debiasing."""
    one = Examples(
        x0=jnp.zeros((1, *image_shape)),
        labels=jnp.zeros(1, jnp.int32) if training.conditional else None,
        t=jnp.ones(1, jnp.int32),
        weight=jnp.ones(1),
        keys=jax.random.split(jax.random.key(0), 1),
    )
    _, (means, _) = jax.eval_shape(lambda: mean_loss(training, params, one))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=training.optimizer.init(params),
        timesteps=training.timesteps.init(training.schedule.of_params(params).num_steps),
        window=bookkeeping.empty_window([*means, "grad_norm"], training.skip_nonfinite),
        power_ema=tuple(jax.tree.map(jnp.copy, params) for _ in training.power_ema),
    )


def train_step(
    training: Training,
    seed: Int[Array, ""],
    state: TrainState,
    images: UInt8[Array, "b h w c"],
    axis_name: str,
    labels: Int[Array, " b"] | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step on this device's share of the batch. Ho et al. (2020), algorithm 1.

    Every random number belongs to a position in the global batch and not to a device. So the same batch gives the same
    step on 1 device or on 8.

    Args:
        training: the definition of the step.
        seed: the seed of all randomness. It is an argument, so runs with other seeds use the same compiled program.
        state: this replica's state.
        images: this device's share of the batch, pixel values.
        axis_name: the name of the devices' axis, over which gradients and metrics are averaged.
        labels: the labels of these images; None for a network that takes none.

    Returns:
        The next state, and the step's metrics: the loss, its parts and the gradient's norm before the clip. For
        `nonfinite` they also hold the batch's t and unweighted losses [B], and the norms of the gradient's
        `bookkeeping.groups`.
    """
    num_steps = training.schedule.of_params(state.params).num_steps
    position = jax.lax.axis_index(axis_name) * len(images) + jnp.arange(len(images))
    own = randomness.of_step(jax.random.fold_in(randomness.stream(seed, "train"), state.step))
    batch_t, batch_weight = training.timesteps.draw(state.timesteps, own.t, training.batch_size, num_steps)
    examples = Examples(
        x0=_augmented(training, images, position, own.flip),
        labels=_known(training, labels, position, own.labels),
        t=batch_t[position],
        weight=batch_weight[position],
        keys=randomness.per_item(own.examples, position),
    )
    *local, losses = _gradients(training, state.params, examples)
    grads, metrics = jax.lax.pmean(local, axis_name)
    batch_losses = jax.lax.all_gather(losses, axis_name, tiled=True)  # every device remembers the whole batch
    metrics["grad_norm"] = optax.global_norm(grads)
    memory = training.timesteps.update(state.timesteps, batch_t, batch_losses)
    next_state = _updated(training, state, grads, memory, metrics)
    for_nonfinite = {"t": batch_t, "losses": batch_losses, "grad_norms": bookkeeping.group_norms(grads)}
    return next_state, metrics | for_nonfinite


def _gradients(
    training: Training, params: PyTree, examples: Examples
) -> tuple[PyTree, dict[str, Float[Array, ""]], Float[Array, " b"]]:
    """The gradient of `mean_loss` and its other results, computed in as many microbatches as the training says."""

    def of(examples: Examples):
        grads, (means, losses) = jax.grad(partial(mean_loss, training), has_aux=True)(params, examples)
        return (grads, means), losses

    (grads, means), losses = bookkeeping.in_microbatches(of, examples, training.grad_accum, training.unroll)
    return grads, means, losses


def _augmented(
    training: Training, images: UInt8[Array, "b h w c"], position: Int[Array, " b"], key: Key[Array, ""]
) -> Float[Array, "b h w c"]:
    """The images in [-1, 1], half of them mirrored if the training says so."""
    x0 = to_unit(images, training.num_levels)
    if not training.flip:
        return x0
    mirrored = jax.random.bernoulli(key, shape=(training.batch_size,))[position]
    return jnp.where(mirrored[:, None, None, None], x0[:, :, ::-1], x0)


def _known(
    training: Training, labels: Int[Array, " b"] | None, position: Int[Array, " b"], key: Key[Array, ""]
) -> Int[Array, " b"] | None:
    """The labels that the network is given. For guidance it must also know the images without labels."""
    if labels is None or training.label_dropout == 0:
        return labels
    is_dropped = jax.random.bernoulli(key, training.label_dropout, (training.batch_size,))[position]
    return jnp.where(is_dropped, NO_LABEL, labels)


def _updated(
    training: Training, state: TrainState, grads: PyTree, memory: PyTree, metrics: dict[str, Float[Array, ""]]
) -> TrainState:
    """The state after the optimizer's step. If the update is skipped for a NaN or Inf, `step` still increases by one.
    """
    with jax.numpy_dtype_promotion("standard"):  # Optax multiplies its integer counts with floats
        updates, opt_state = training.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    window = bookkeeping.window_at(state.step, state.window, training.log_every)
    next_state = state.replace(
        step=state.step + 1,
        params=params,
        ema_params=optax.incremental_update(params, state.ema_params, 1.0 - training.ema_decay),
        opt_state=opt_state,
        timesteps=memory,
        window=bookkeeping.added(window, metrics),
        power_ema=post_hoc_ema.track(state.power_ema, params, state.step + 1, training.power_ema),
    )
    if not training.skip_nonfinite:
        return next_state
    left_out = state.replace(step=state.step + 1, window=bookkeeping.skipped(window))
    return bookkeeping.unless_nonfinite(metrics, next_state, left_out)
