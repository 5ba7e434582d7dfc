"""Data parallelism with `jax.pmap`: the train step on all devices, its batches, and a check of the replicas."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree

from diffusion.data import Source
from diffusion.runtime.devices import AXIS, Replicated, local_rows, replicate, sharding
from diffusion.runtime.digests import named_leaves
from diffusion.training.bookkeeping import group_norms
from diffusion.training.step import Training, train_step


def check_batch_size(batch_size: int, grad_accum: int) -> None:
    """Raises a ValueError unless the devices can split the batch, each into `grad_accum` equal microbatches."""
    devices = jax.device_count()
    if batch_size % (devices * grad_accum):
        split = f"{devices} devices × train.grad_accum={grad_accum}" if grad_accum > 1 else f"{devices} devices"
        raise ValueError(f"train.batch_size={batch_size} does not divide by {split}")


class Batch(NamedTuple):
    """The data from which the steps of one call are made, on the devices."""

    images: jax.Array  # uint8 [devices, n, H, W, C]
    labels: jax.Array | None  # int32 [devices, n]; None where the network takes none
    indices: jax.Array  # int [devices, steps, b]: which of these images make up a device's share of each step


Batches = Callable[[Int[np.ndarray, "steps b"]], Batch]  # from the numbers of the examples of each step's global batch


def resident(source: Source, conditional: bool = False) -> Batches:
    """Batches of a data set of which every device holds a full copy, with its labels for a conditional network."""
    images = replicate(source.images()).leaves
    labels = replicate(source.labels()).leaves if conditional else None
    return lambda indices: Batch(images, labels, jax.device_put(_shares(indices), sharding()))


def streamed(source: Source, conditional: bool = False) -> Batches:
    """Batches of a data set that stays on disk. Each device gets only the examples of its own share."""

    def batch(indices: np.ndarray) -> Batch:
        shares = _shares(indices)
        images = source.images(shares.ravel()).reshape(len(shares), -1, *source.image_shape)
        labels = source.labels(shares.ravel()).reshape(len(shares), -1) if conditional else None
        positions = np.arange(images.shape[1], dtype=indices.dtype).reshape(shares.shape[1:])
        return jax.device_put(Batch(images, labels, np.broadcast_to(positions, shares.shape)), sharding())

    return batch


TrainSteps = Callable[[Replicated, Batch], tuple[Replicated, Replicated]]


def train_steps(training: Training, seed: int) -> TrainSteps:
    """Several train steps as one compiled call: (state, batch) -> (state, metrics).

    The state is donated, so do not use it again. The leaves of the metrics are [steps, ...]; `param_norms` are from
    before the call.
    """
    compiled, seeds = compiled_train_steps(training), replicate(np.int32(seed)).leaves

    def call(state: Replicated, batch: Batch) -> tuple[Replicated, Replicated]:
        next_state, metrics = compiled(seeds, state.leaves, *batch)
        return Replicated(next_state), Replicated(metrics)

    return call


def compiled_train_steps(training: Training, devices: Sequence[jax.Device] | None = None) -> Callable:
    """The program behind `train_steps`: (seeds, state, *Batch) -> (state, metrics).

    A single step is not put into a loop, because gradients of convolutions are many times slower inside one on the CPU
    backend. `devices` are all devices, or those to compile for.
    """

    def call(seed, state, images, labels, indices):
        def body(state, step_indices):
            own_labels = None if labels is None else labels[step_indices]
            return train_step(training, seed, state, images[step_indices], AXIS, own_labels)

        # For every step they would be a twentieth of a GPU's kernels.
        norms = group_norms(state.params)
        if len(indices) == 1:
            state, metrics = body(state, indices[0])
            metrics = jax.tree.map(lambda metric: metric[None], metrics)
        else:
            state, metrics = jax.lax.scan(body, state, indices)
        return state, metrics | {"param_norms": jnp.broadcast_to(norms, (len(indices), *norms.shape))}

    return jax.pmap(call, axis_name=AXIS, donate_argnums=1, devices=devices)


def _shares(indices: Int[np.ndarray, "steps b"]) -> Int[np.ndarray, "devices steps share"]:
    """The examples of each of this process's devices: [steps, B] -> [devices, steps, B/devices]."""
    return local_rows(np.swapaxes(indices.reshape(len(indices), jax.device_count(), -1), 0, 1))


def differing_replicas() -> Callable[[Replicated], list[str]]:
    """A function of a replicated tree. It names the leaves whose copies differ between devices.

    Every device sums the bits of its copy. Each number has an odd weight of its own, so one changed bit always changes
    the sum. Only the sums leave the device, 4 bytes per leaf.
    """

    def checksum(leaf: jax.Array) -> jax.Array:
        unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32).reshape(-1)
        return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)

    def checksums(tree: PyTree) -> jax.Array:
        return jax.lax.all_gather(jnp.stack([checksum(leaf) for leaf in jax.tree.leaves(tree)]), AXIS)

    compiled = jax.pmap(checksums, axis_name=AXIS)

    def names(tree: Replicated) -> list[str]:
        sums = Replicated(compiled(tree.leaves)).host()
        is_different = (sums != sums[0]).any(axis=0)
        leaves = named_leaves(tree.leaves)
        return [name for (name, _), different in zip(leaves, is_different, strict=True) if different]

    return names
