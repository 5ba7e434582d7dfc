"""The pure train step: everything that happens between two values of the state, for one device's share of it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt8

from diffusion import learned_schedule, likelihood, process, randomness
from diffusion.objectives import Problem
from diffusion.schedules import Schedule
from diffusion.state import TrainState
from diffusion.timesteps import TimestepSampler


def to_unit(images: UInt8[Array, "*shape"], num_levels: int) -> Float[Array, "*shape"]:
    """Grey levels 0…L−1 as numbers in [-1, 1], without dequantization. Ho et al. (2020), section 3.3."""
    return images.astype(jnp.float32) / ((num_levels - 1) / 2) - 1.0


def to_levels(x: Float[Array, "*shape"], num_levels: int) -> UInt8[Array, "*shape"]:
    """The inverse of `to_unit`, rounded to the nearest grey level."""
    return jnp.round((jnp.clip(x, -1.0, 1.0) + 1.0) * ((num_levels - 1) / 2)).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Training:
    """What defines one train step, apart from the state and the data.

    Attributes:
        apply: (params, x_t [B, H, W, C], network_t [B], dropout keys [B] or None) -> output.
        objective, problem: see `objectives`.
        timesteps: how t is drawn; see `timesteps`.
        schedule_of: params -> the forward process, which depends on them if it is learned.
        inner_schedule: None for a fixed schedule; how a learned one is trained: see `learned_schedule.losses`.
        optimizer: from Optax.
        ema_decay: of the parameters' moving average.
        seed: of all randomness.
        batch_size: images per step, over all devices.
        flip: whether half of the images are mirrored.
        log_every: after how many steps `state.window` starts afresh.
        skip_nonfinite: whether an update with a number that is not finite is left out, and counted in the window.
        grad_accum: in how many pieces a device's share goes through the network.
        unroll: write the loop over pieces out, for backends that are slow inside loops.
    """

    apply: Callable[..., Array]
    objective: Callable[..., Any]
    problem: Problem
    timesteps: TimestepSampler
    schedule_of: Callable[[PyTree], Schedule]
    inner_schedule: str | None
    optimizer: optax.GradientTransformation
    ema_decay: float
    seed: int
    batch_size: int
    flip: bool
    log_every: int
    skip_nonfinite: bool = False
    grad_accum: int = 1
    unroll: bool = False


def losses(
    training: Training, params: PyTree, t: Int[Array, " b"], keys: Key[Array, " b"], x0: Array, dropout: bool
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """Each example's loss and its parts, for given t; ε and dropout come from each example's own key.

    A learned schedule answers for the prior's term of the bound, too, which no network can change.
    """
    noise_keys, dropout_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    eps = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(noise_keys)

    def at(params: PyTree, row: Schedule):
        x_t = jax.vmap(process.q_sample)(row, x0, eps)
        output = training.apply(params, x_t, row.network_t, dropout_keys if dropout else None)
        one = lambda *example: training.objective(training.problem, *example)  # noqa: E731
        return jax.vmap(one)(row, x0, x_t, eps, output)

    schedule = training.schedule_of(params)
    if training.inner_schedule is None:
        return at(params, schedule[t])
    loss, parts = learned_schedule.losses(at, params, t, training.inner_schedule)
    prior = jax.vmap(lambda image: likelihood.prior_bpd(schedule, image))(x0)
    return loss + prior, parts | {"prior_bpd": prior}


def gradients(
    training: Training,
    params: PyTree,
    t: Int[Array, " b"],
    weight: Float[Array, " b"],
    keys: Key[Array, " b"],
    x0: Float[Array, "b h w c"],
) -> tuple[PyTree, dict[str, Float[Array, ""]], Float[Array, " b"]]:
    """The gradient of the mean of weight × loss, its metrics, and each example's loss without the weight.

    The batch goes through the network in `training.grad_accum` pieces.
    """

    def mean_loss(params, t, weight, keys, x0):
        loss, parts = losses(training, params, t, keys, x0, dropout=True)
        metrics = jax.tree.map(lambda values: (weight * values).mean(), {"loss": loss} | parts)
        return metrics["loss"], (metrics, loss)

    def of_piece(piece):
        grads, (metrics, loss) = jax.grad(mean_loss, has_aux=True)(params, *piece)
        return (grads, metrics), loss

    def accumulate(total, piece):
        new, loss = of_piece(piece)
        return jax.tree.map(jnp.add, total, new), loss

    batch = (t, weight, keys, x0)
    if training.grad_accum == 1:
        (grads, metrics), loss = of_piece(batch)
        return grads, metrics, loss
    pieces = jax.tree.map(lambda a: a.reshape(training.grad_accum, -1, *a.shape[1:]), batch)
    like, _ = jax.eval_shape(of_piece, jax.tree.map(lambda a: a[0], pieces))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    total, loss = jax.lax.scan(accumulate, zeros, pieces, unroll=training.unroll)
    grads, metrics = jax.tree.map(lambda leaf: leaf / training.grad_accum, total)
    return grads, metrics, loss.reshape(len(t))


def train_step(
    training: Training, state: TrainState, images: UInt8[Array, "n h w c"], indices: Int[Array, " b"], axis_name: str
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step on this device's share of the batch.

    Every random number belongs to a position in the global batch and not to a device, so the same batch gives
    the same step on 1 device or on 8.

    Args:
        training: what defines the step.
        state: this replica's state.
        images: the whole data set, grey levels.
        indices: which images this device takes.
        axis_name: of the devices' axis, over which gradients and metrics are averaged.

    Returns:
        The next state, and the step's metrics: the loss, its parts and the gradient's norm before the clip. Besides,
        for `nonfinite`: the batch's t and unweighted losses [B], and the norms of `groups` of the gradient.
    """
    local_size = len(indices)
    position = jax.lax.axis_index(axis_name) * local_size + jnp.arange(local_size)
    step_key = jax.random.fold_in(randomness.stream(training.seed, "train"), state.step)
    t_key, examples_key, flip_key = jax.random.split(step_key, 3)
    batch_t, batch_weight = training.timesteps.draw(
        state.timesteps, t_key, training.batch_size, training.problem.num_steps
    )
    t, weight = batch_t[position], batch_weight[position]
    keys = randomness.per_item(examples_key, position)
    x0 = to_unit(images[indices], training.problem.num_levels)
    if training.flip:
        mirrored = jax.random.bernoulli(flip_key, shape=(training.batch_size,))[position]
        x0 = jnp.where(mirrored[:, None, None, None], x0[:, :, ::-1], x0)

    *local, loss = gradients(training, state.params, t, weight, keys, x0)
    grads, metrics = jax.lax.pmean(local, axis_name)
    batch_loss = jax.lax.all_gather(loss, axis_name, tiled=True)  # every device remembers the whole batch

    with jax.numpy_dtype_promotion("standard"):  # Optax multiplies its integer counts with floats
        updates, opt_state = training.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics["grad_norm"] = optax.global_norm(grads)
    keep = jnp.where(state.step % training.log_every == 0, 0.0, 1.0)
    added = metrics | {"count": 1.0, "skipped": 0.0}
    window = {name: keep * total + added[name] for name, total in state.window.items()}
    next_state = state.replace(
        step=state.step + 1,
        params=params,
        ema_params=optax.incremental_update(params, state.ema_params, 1.0 - training.ema_decay),
        opt_state=opt_state,
        timesteps=training.timesteps.update(state.timesteps, batch_t, batch_loss),
        window=window,
    )
    if training.skip_nonfinite:
        is_finite = jnp.isfinite(jnp.stack(list(metrics.values()))).all()
        kept = {name: keep * total for name, total in state.window.items()}
        next_state = _unless_nonfinite(is_finite, state, next_state, kept)
    return next_state, metrics | {"t": batch_t, "losses": batch_loss, "grad_norms": group_norms(grads)}


def groups(params: PyTree) -> list[str]:
    """The names of the parameter groups: the network's modules."""
    return sorted(params)


def group_norms(tree: PyTree) -> Float[Array, " groups"]:
    """The Euclidean norm of each of the `groups` of parameters, or of their gradient."""
    return jnp.stack([optax.global_norm(tree[name]) for name in groups(tree)])


def _unless_nonfinite(
    is_finite: Bool[Array, ""], state: TrainState, next_state: TrainState, window: dict[str, Float[Array, ""]]
) -> TrainState:
    """`next_state`, or `state` one step later and with `window`; the window's count of such steps is never reset."""
    left_out = state.replace(step=next_state.step, window=window)
    chosen = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), next_state, left_out)
    skipped = state.window["skipped"] + jnp.where(is_finite, 0.0, 1.0)
    return chosen.replace(window=chosen.window | {"skipped": skipped})
