"""The pure train step: everything that happens between two values of the state, for one device's share of it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, Real, UInt8

from diffusion import continuous_time, learned_schedule, likelihood, process
from diffusion.data.levels import to_unit
from diffusion.guidance import NO_LABEL
from diffusion.objectives import Objective
from diffusion.runtime import randomness
from diffusion.schedules import Schedule
from diffusion.timesteps import TimestepSampler


@flax.struct.dataclass
class TrainState:
    """One replica's state; a checkpoint is exactly this.

    Randomness and data order follow from (seed, step) and are not part of it. `window` sums the metrics since the
    last row of metrics.jsonl, so that a run that was stopped in between writes the same row as one that was not. Its
    entry `skipped`, if there is one, counts over the whole run.
    """

    step: Any  # int32 []: optimizer steps taken. (Leaves may be arrays, NumPy arrays or their shapes.)
    params: PyTree
    ema_params: PyTree  # an exponential moving average of params
    opt_state: Any
    timesteps: PyTree  # what the draw of t remembers: see `timesteps.TimestepSampler`
    window: dict[str, Any]  # float32 []: sums over `count` steps


@dataclasses.dataclass(frozen=True)
class Training:
    """What defines one train step, apart from the seed, the state and the data.

    Attributes:
        network: a module of `networks.NETWORKS`.
        objective: the loss of one example: see `objectives`.
        timesteps: how t is drawn; see `timesteps`.
        schedule_of: params -> the forward process, which depends on them if it is learned.
        inner_schedule: None for a fixed schedule; how a learned one is trained: see `learned_schedule.losses`.
        optimizer: from Optax.
        ema_decay: of the parameters' moving average.
        num_levels: how many pixel values the data have.
        batch_size: images per step, over all devices.
        flip: whether half of the images are mirrored.
        times: which t `timesteps` draws, one of `timesteps.TIMES`. But for "every_term" the decoder's term of the bound
            is not among them, and is computed for every example.
        conditional: whether the network is given the images' labels.
        label_dropout: the part of the examples whose label the network is not given.
        log_every: after how many steps `state.window` starts again from zero.
        skip_nonfinite: whether an update with a NaN or Inf is left out, and counted in the window.
        grad_accum: in how many microbatches a device's share goes through the network.
        unroll: write the loop over microbatches out, for backends that are slow inside loops.
    """

    network: nn.Module
    objective: Objective
    timesteps: TimestepSampler
    schedule_of: Callable[[PyTree], Schedule]
    inner_schedule: str | None
    optimizer: optax.GradientTransformation
    ema_decay: float
    num_levels: int
    batch_size: int
    flip: bool
    log_every: int
    times: str = "every_term"
    conditional: bool = False
    label_dropout: float = 0.0
    skip_nonfinite: bool = False
    grad_accum: int = 1
    unroll: bool = False


def initial_state(training: Training, params: PyTree, image_shape: tuple[int, int, int]) -> TrainState:
    """The state before the first step. The EMA starts as a copy of the parameters, so it needs no debiasing."""
    image, t, keys = jnp.zeros((1, *image_shape)), jnp.ones(1, jnp.int32), jax.random.split(jax.random.key(0), 1)
    labels = jnp.zeros(1, jnp.int32) if training.conditional else None
    _, parts = jax.eval_shape(lambda: losses(training, params, t, keys, image, False, labels))
    skipped = ("skipped",) if training.skip_nonfinite else ()
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=training.optimizer.init(params),
        timesteps=training.timesteps.init(training.schedule_of(params).num_steps),
        window={name: jnp.zeros(()) for name in ("loss", *parts, "grad_norm", *skipped, "count")},
    )


def losses(
    training: Training,
    params: PyTree,
    t: Real[Array, " b"],
    keys: Key[Array, " b"],
    x0: Float[Array, "b h w c"],
    dropout: bool,
    labels: Int[Array, " b"] | None = None,
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """Each example's loss and its parts, for given t; ε and dropout come from each example's own key.

    Real t are instants of continuous time.
    `labels` are those that the network is given, None for one that takes none.

    A learned schedule answers for the prior's term of the bound, too, which no network can change.
    """
    noise_keys, dropout_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    eps = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(noise_keys)

    def losses_at(params: PyTree, row: Schedule):
        x_t = jax.vmap(process.q_sample)(row, x0, eps)
        given = {} if labels is None else {"labels": labels}
        own_keys = dropout_keys if dropout else None
        output = training.network.apply({"params": params}, x_t, row.network_t, own_keys, **given)
        return jax.vmap(training.objective)(row, x0, x_t, eps, output)

    def rows_of(params: PyTree) -> Schedule:
        return continuous_time.rows(training.schedule_of(params), t)

    if training.inner_schedule is None:
        loss, parts = losses_at(params, rows_of(params))
        ends, schedule = {}, training.schedule_of(params)
    else:
        loss, parts = learned_schedule.losses(losses_at, params, rows_of, training.inner_schedule)
        schedule = training.schedule_of(learned_schedule.with_fixed_inner(params))
        ends = {"prior_bpd": jax.vmap(lambda image: likelihood.prior_bpd(schedule, image))(x0)}
    if training.times != "every_term":
        ends["decoder_bpd"] = _decoder_bpd(schedule[1], keys, x0, training.num_levels)
    return sum(ends.values(), loss), parts | ends


def _decoder_bpd(
    row: Schedule, keys: Key[Array, " b"], x0: Float[Array, "b h w c"], num_levels: int
) -> Float[Array, " b"]:
    """The decoder's term of each example, with noise of its own. Only the decoder "bayes" needs no network for it."""

    def one(key: Key[Array, ""], image: Array) -> Array:
        eps = jax.random.normal(jax.random.fold_in(key, 1), image.shape)
        return likelihood.bayes_decoder_bpd(row, image, eps, num_levels)

    return jax.vmap(one)(keys, x0)


def gradients(
    training: Training,
    params: PyTree,
    t: Real[Array, " b"],
    weight: Float[Array, " b"],
    keys: Key[Array, " b"],
    x0: Float[Array, "b h w c"],
    labels: Int[Array, " b"] | None,
) -> tuple[PyTree, dict[str, Float[Array, ""]], Float[Array, " b"]]:
    """The gradient of the mean of weight × loss, its metrics, and each example's loss without the weight.

    The batch goes through the network in `training.grad_accum` microbatches.
    """

    def mean_loss(params, t, weight, keys, x0, labels):
        loss, parts = losses(training, params, t, keys, x0, True, labels)
        metrics = jax.tree.map(lambda values: (weight * values).mean(), {"loss": loss} | parts)
        return metrics["loss"], (metrics, loss)

    def of_microbatch(microbatch):
        grads, (metrics, loss) = jax.grad(mean_loss, has_aux=True)(params, *microbatch)
        return (grads, metrics), loss

    def accumulate(total, microbatch):
        new, loss = of_microbatch(microbatch)
        return jax.tree.map(jnp.add, total, new), loss

    batch = (t, weight, keys, x0, labels)
    if training.grad_accum == 1:
        (grads, metrics), loss = of_microbatch(batch)
        return grads, metrics, loss
    microbatches = jax.tree.map(lambda a: a.reshape(training.grad_accum, -1, *a.shape[1:]), batch)
    like, _ = jax.eval_shape(of_microbatch, jax.tree.map(lambda a: a[0], microbatches))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    total, loss = jax.lax.scan(accumulate, zeros, microbatches, unroll=training.unroll)
    grads, metrics = jax.tree.map(lambda leaf: leaf / training.grad_accum, total)
    return grads, metrics, loss.reshape(len(t))


def train_step(
    training: Training,
    seed: Int[Array, ""],
    state: TrainState,
    images: UInt8[Array, "b h w c"],
    axis_name: str,
    labels: Int[Array, " b"] | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step on this device's share of the batch. Ho et al. (2020), algorithm 1.

    Every random number belongs to a position in the global batch and not to a device, so the same batch gives
    the same step on 1 device or on 8.

    Args:
        training: what defines the step.
        seed: of all randomness. An argument, so that runs of other seeds are the same compiled program.
        state: this replica's state.
        images: this device's share of the batch, pixel values.
        axis_name: of the devices' axis, over which gradients and metrics are averaged.
        labels: of these images; None for a network that takes none.

    Returns:
        The next state, and the step's metrics: the loss, its parts and the gradient's norm before the clip. Besides,
        for `nonfinite`: the batch's t and unweighted losses [B], and the norms of `groups` of the gradient.
    """
    num_steps = training.schedule_of(state.params).num_steps
    position = jax.lax.axis_index(axis_name) * len(images) + jnp.arange(len(images))
    step_key = jax.random.fold_in(randomness.stream(seed, "train"), state.step)
    t_key, examples_key, flip_key, label_key = jax.random.split(step_key, 4)
    batch_t, batch_weight = training.timesteps.draw(state.timesteps, t_key, training.batch_size, num_steps)
    keys = randomness.per_item(examples_key, position)
    x0 = _augmented(training, images, position, flip_key)

    labels = _known(training, labels, position, label_key)

    *local, loss = gradients(training, state.params, batch_t[position], batch_weight[position], keys, x0, labels)
    grads, metrics = jax.lax.pmean(local, axis_name)
    batch_loss = jax.lax.all_gather(loss, axis_name, tiled=True)  # every device remembers the whole batch
    metrics["grad_norm"] = optax.global_norm(grads)
    memory = training.timesteps.update(state.timesteps, batch_t, batch_loss)
    next_state = _updated(training, state, grads, memory, metrics)
    return next_state, metrics | {"t": batch_t, "losses": batch_loss, "grad_norms": group_norms(grads)}


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
    """The labels that the network is given: for guidance it must know the images without labels, too."""
    if labels is None or training.label_dropout == 0:
        return labels
    is_dropped = jax.random.bernoulli(key, training.label_dropout, (training.batch_size,))[position]
    return jnp.where(is_dropped, NO_LABEL, labels)


def _updated(
    training: Training, state: TrainState, grads: PyTree, memory: PyTree, metrics: dict[str, Float[Array, ""]]
) -> TrainState:
    """The state after the optimizer's step, or only one step later if the update has a NaN or Inf and is left out."""
    with jax.numpy_dtype_promotion("standard"):  # Optax multiplies its integer counts with floats
        updates, opt_state = training.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = jnp.where(state.step % training.log_every == 0, 0.0, 1.0)
    kept = {name: keep * total for name, total in state.window.items()}
    added = metrics | {"count": 1.0, "skipped": 0.0}
    next_state = state.replace(
        step=state.step + 1,
        params=params,
        ema_params=optax.incremental_update(params, state.ema_params, 1.0 - training.ema_decay),
        opt_state=opt_state,
        timesteps=memory,
        window={name: total + added[name] for name, total in kept.items()},
    )
    if not training.skip_nonfinite:
        return next_state
    is_finite = jnp.isfinite(jnp.stack(list(metrics.values()))).all()
    return _unless_nonfinite(is_finite, state, next_state, kept)


def _unless_nonfinite(
    is_finite: Bool[Array, ""], state: TrainState, next_state: TrainState, window: dict[str, Float[Array, ""]]
) -> TrainState:
    """`next_state`, or `state` one step later and with `window`; the window's count of such steps is never reset."""
    left_out = state.replace(step=next_state.step, window=window)
    chosen = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), next_state, left_out)
    skipped = state.window["skipped"] + jnp.where(is_finite, 0.0, 1.0)
    return chosen.replace(window=chosen.window | {"skipped": skipped})


def groups(params: PyTree) -> list[str]:
    """The names of the parameter groups: the network's modules."""
    return sorted(params)


def group_norms(tree: PyTree) -> Float[Array, " groups"]:
    """The Euclidean norm of each of the `groups` of parameters, or of their gradient."""
    return jnp.stack([optax.global_norm(tree[name]) for name in groups(tree)])
