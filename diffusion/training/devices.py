"""Data parallelism with `jax.pmap`: the only file that knows how many devices there are."""

import math
from collections.abc import Callable, Iterator, Sequence

import flax.jax_utils
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from diffusion.digests import named_leaves
from diffusion.step import Training, group_norms, train_step

AXIS = "devices"


def check_batch_size(batch_size: int, pieces: int) -> None:
    """Raises a ValueError unless the devices can share the batch, each in `pieces` equal pieces."""
    devices = jax.device_count()
    if batch_size % (devices * pieces):
        split = f"{devices} devices × train.grad_accum={pieces} pieces" if pieces > 1 else f"{devices} devices"
        raise ValueError(f"train.batch_size={batch_size} does not divide by {split}")


def replicate(tree: PyTree) -> PyTree:
    """One copy of a host tree for each device: leaves [devices, ...]."""
    # The copies get the sharding that pmap itself returns; with another one the second step would compile again.
    return flax.jax_utils.replicate(tree, axis_name=AXIS)


def unreplicate(tree: PyTree) -> PyTree:
    """The first device's copy as NumPy arrays; no other device is read."""
    return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_shards[0].data).reshape(leaf.shape[1:]), tree)


def over_devices(fn: Callable) -> Callable:
    """`fn` on every device of every process at once, over the leading axis of every argument.

    Host arrays hold the rows of all devices, and each process takes its own; arrays on devices stay as they are.
    """
    compiled = jax.pmap(fn, axis_name=AXIS)
    local = lambda leaf: _local_rows(leaf) if isinstance(leaf, np.ndarray) else leaf  # noqa: E731
    return lambda *arguments: compiled(*jax.tree.map(local, arguments))


def _local_rows(array: np.ndarray) -> np.ndarray:
    """Of an array [devices, ...] the rows of this process's devices."""
    devices = jax.local_device_count()
    return array[jax.process_index() * devices :][:devices]


def train_steps(training: Training, devices: Sequence[jax.Device] | None = None) -> Callable:
    """Several train steps as one compiled call: (state, images, indices [devices, steps, b]) -> (state, metrics).

    The state is donated; the metrics' leaves are [devices, steps]. `param_norms`, for `nonfinite`, are those before the
    call: for every step they would be a twentieth of a GPU's kernels. A single step is not put into a loop: on the CPU
    backend gradients of convolutions are many times slower inside one. `devices` are all there are, or those to compile
    for.
    """

    def call(state, images, indices):
        def body(state, step_indices):
            return train_step(training, state, images, step_indices, AXIS)

        norms = group_norms(state.params)
        if len(indices) == 1:
            state, metrics = body(state, indices[0])
            metrics = jax.tree.map(lambda metric: metric[None], metrics)
        else:
            state, metrics = jax.lax.scan(body, state, indices)
        return state, metrics | {"param_norms": jnp.broadcast_to(norms, (len(indices), *norms.shape))}

    return jax.pmap(call, axis_name=AXIS, donate_argnums=0, devices=devices)


def shard_steps(indices: np.ndarray) -> jax.Array:
    """[steps, B] -> [devices, steps, B/devices], the parts of this process's devices on each of them."""
    parts = _local_rows(np.swapaxes(indices.reshape(len(indices), jax.device_count(), -1), 0, 1))
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), (AXIS,))
    return jax.device_put(parts, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS)))


def padded_batches(num_items: int, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """All of 0…num_items−1 in batches [devices, b] of one shape, each with its number of real entries.

    The batches are as equal as they can be; the last one is filled up with repetitions of its first item, and its
    real entries come first in the flattened batch.
    """
    devices = jax.device_count()
    num_batches = math.ceil(num_items / batch_size)
    per_device = math.ceil(num_items / num_batches / devices)
    for start in range(0, num_items, devices * per_device):
        batch = np.arange(start, min(start + devices * per_device, num_items))
        filled = np.full(devices * per_device, start)
        filled[: len(batch)] = batch
        yield filled.reshape(devices, per_device), len(batch)


def gather(array: jax.Array, num_real: int) -> np.ndarray:
    """The real entries of a result [devices, b, ...] from all processes' devices, on every host."""
    host = np.asarray(array)
    if jax.process_count() > 1:
        host = multihost_utils.process_allgather(host, tiled=True)
    return host.reshape(-1, *host.shape[2:])[:num_real]


def differing_replicas() -> Callable[[PyTree], list[str]]:
    """A function of a replicated tree that names the leaves whose copies are not the same on all devices.

    Every device sums its copy's bits, each number's with an odd weight of its own, so that one changed bit always
    changes the sum; only the sums, 4 bytes per leaf, leave the device.
    """

    def checksum(leaf: jax.Array) -> jax.Array:
        unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32).reshape(-1)
        return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)

    def checksums(tree: PyTree) -> jax.Array:
        return jax.lax.all_gather(jnp.stack([checksum(leaf) for leaf in jax.tree.leaves(tree)]), AXIS)

    compiled = jax.pmap(checksums, axis_name=AXIS)

    def names(replicated: PyTree) -> list[str]:
        sums = unreplicate(compiled(replicated))
        is_different = (sums != sums[0]).any(axis=0)
        return [name for (name, _), different in zip(named_leaves(replicated), is_different, strict=True) if different]

    return names
