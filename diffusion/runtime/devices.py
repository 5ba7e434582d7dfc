"""The handling of devices that all programs share: copies of a tree on every device, and batches that devices split.

Other modules pass in host arrays, and get back host arrays or a `Replicated` tree. Only this module and
`training.parallel` know its [devices, ...] axis.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import ArrayLike
from jaxtyping import PyTree

AXIS = "devices"
MANY = 20  # from so many batches on, the padding of the last one costs at most a MANYth of the time


@dataclasses.dataclass(frozen=True)
class Replicated:
    """A tree of which every device holds a copy."""

    leaves: PyTree  # [devices, ...]

    def host(self) -> PyTree:
        """The first device's copy as NumPy arrays; no other device is read."""
        first = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data, self.leaves)
        return jax.tree.map(lambda copy: copy.reshape(copy.shape[1:]), jax.device_get(first))  # all leaves at once

    def part(self, choose: Callable[[PyTree], PyTree]) -> "Replicated":
        """A part of the tree, such as `lambda state: state.ema_params`; nothing is copied."""
        return Replicated(choose(self.leaves))

    def wait(self) -> None:
        """Blocks until every device has computed its copy."""
        jax.block_until_ready(self.leaves)


def replicate(tree: PyTree) -> Replicated:
    """A copy of a host tree on every device. The host needs no extra memory for it."""
    on_rows, count = sharding(), jax.local_device_count()

    def copies(leaf: ArrayLike) -> jax.Array:
        copy = np.asarray(leaf)[None]
        return jax.make_array_from_callback((count, *copy.shape[1:]), on_rows, lambda _: copy)

    return Replicated(jax.tree.map(copies, tree))


def sharding() -> jax.sharding.NamedSharding:
    """Places an array [devices, ...] row by row on this process's devices.

    It equals the sharding of `jax.pmap`'s outputs. If the inputs had another one, the second step would compile again.
    """
    return jax.sharding.NamedSharding(_mesh(jax.local_devices()), jax.sharding.PartitionSpec(AXIS))


def _mesh(devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(devices), (AXIS,))


def local_rows(array: np.ndarray) -> np.ndarray:
    """The rows of an array [devices, ...] that belong to this process's devices."""
    devices = jax.local_device_count()
    return array[jax.process_index() * devices :][:devices]


def on_each(fn: Callable[..., PyTree], devices: Sequence[jax.Device] | None = None) -> Callable[..., PyTree]:
    """`fn` on each device's row of arrays [devices, ...], compiled once.

    Every process runs its own program on its own devices, and none waits for another.

    Args:
        fn: a function of trees of arrays that returns a tree of arrays.
        devices: this process's devices, or those to compile for.
    """

    def on_own_rows(*rows: PyTree) -> PyTree:
        results = fn(*jax.tree.map(lambda leaf: leaf[0], rows))
        return jax.tree.map(lambda leaf: leaf[None], results)

    mesh, spec = _mesh(devices or jax.local_devices()), jax.sharding.PartitionSpec(AXIS)
    return jax.jit(jax.shard_map(on_own_rows, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


InBatches = Callable[..., Iterator[tuple[np.ndarray, PyTree]]]


def over_batches(fn: Callable[[PyTree, PyTree], PyTree]) -> InBatches:
    """`fn`(shared, items) over any number of items, in batches that all devices share.

    Args:
        fn: (the shared tree, items with leaves [b, ...]) -> a tree of results with leaves [b, ...].

    Returns:
        (a tree of `Replicated`, items with leaves [N, ...] on the host, batch size) -> an iterator of the numbers [n]
        of finished items and their results [n, ...] on the host. Every item comes once, on every process. One batch is
        computed while the one before is fetched.

        `load`, if given, turns the items [devices, b] of a batch into the inputs of `fn`, on the host, for this
        process's devices alone. A batch is left out if `is_done` [N] is true for all of its items; the other batches do
        not change.
    """
    compiled, on_rows = on_each(fn), sharding()

    def run(
        shared: PyTree,
        items: PyTree,
        batch_size: int,
        load: Callable[[PyTree], PyTree] | None = None,
        is_done: np.ndarray | None = None,
    ) -> Iterator[tuple[np.ndarray, PyTree]]:
        on_devices = jax.tree.map(lambda tree: tree.leaves, shared, is_leaf=lambda tree: isinstance(tree, Replicated))
        running = None
        for numbers, num_real in _padded_batches(len(jax.tree.leaves(items)[0]), batch_size):
            if is_done is not None and is_done[numbers].all():
                continue
            batch = jax.tree.map(lambda leaf: local_rows(leaf[numbers]), items)  # noqa: B023
            batch = batch if load is None else load(batch)
            started = numbers.ravel()[:num_real], compiled(on_devices, jax.device_put(batch, on_rows))
            if running is not None:
                yield _fetched(*running)
            running = started
        if running is not None:
            yield _fetched(*running)

    return run


def _padded_batches(num_items: int, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """All of 0…num_items−1 in batches [devices, b] of one shape, each with its number of real entries.

    A few batches are as equal as they can be. Many batches are full ones, so that any so large numbers of items share
    one compiled program. The last batch is filled up with repetitions of its first item, and its real entries come
    first in the flattened batch.
    """
    devices = jax.device_count()
    num_batches = math.ceil(num_items / batch_size)
    largest = batch_size if num_batches >= MANY else num_items / max(num_batches, 1)
    per_device = math.ceil(largest / devices)
    for start in range(0, num_items, devices * per_device or 1):
        batch = np.arange(start, min(start + devices * per_device, num_items))
        filled = np.full(devices * per_device, start)
        filled[: len(batch)] = batch
        yield filled.reshape(devices, per_device), len(batch)


def _fetched(numbers: np.ndarray, results: PyTree) -> tuple[np.ndarray, PyTree]:
    """The real entries of results [devices, b, ...] from all processes' devices, on every host."""

    def fetch(leaf: jax.Array) -> np.ndarray:
        host = np.asarray(leaf)
        if jax.process_count() > 1:
            host = multihost_utils.process_allgather(host, tiled=True)
        return host.reshape(-1, *host.shape[2:])[: len(numbers)]

    return numbers, jax.tree.map(fetch, results)
