"""Data parallelism: eight devices take the steps of one."""

from functools import partial

import jax
import numpy as np
import pytest

from diffusion import data
from diffusion.data import Source
from diffusion.experiment import build
from diffusion.runtime import devices
from diffusion.training import parallel
from diffusion.training.bookkeeping import group_norms
from diffusion.training.step import train_step

# Much dropout, because a block's output begins near zero: in a few steps little of it is seen.
UNET = {"model__network": "unet", "unet__dropout": 0.7}
DROPOUT = "labelled(dropout=0.7)"  # a layer with no labels


class Steps:
    """A few train steps of a config, each program compiled once: on all devices with pmap, or on one without."""

    def __init__(self, config):
        self.config = config
        self.source = data.load(config.data.name, "train", config.data.data_dir)
        self.batch = parallel.resident(self.source)
        self.experiment = build.experiment(config, (8, 8, 1), 17)
        self.start = jax.device_get(self.experiment.initial_state())
        self.pmapped = parallel.train_steps(self.experiment.training, config.seed)
        one = partial(train_step, self.experiment.training, axis_name="devices")
        self.single = jax.jit(jax.vmap(one, axis_size=1, axis_name="devices", in_axes=(None, None, 0)))

    def indices(self, *steps):
        """[steps, B]."""
        size, number = self.config.train.batch_size, len(self.source)
        return np.stack([data.batch_indices(self.config.seed, step, size, number) for step in steps])

    def on_all_devices(self, num_steps):
        """The replicated state after so many steps, and the host's metrics [1, ...] of the last one."""
        state = devices.replicate(self.start)
        for step in range(num_steps):
            state, metrics = self.pmapped(state, self.batch(self.indices(step)))
        return state, metrics.host()

    def on_one_device(self, num_steps):
        """The state after so many steps, and the metrics of the last one."""
        state = self.start
        for step in range(num_steps):
            stepped = self.single(np.int32(self.config.seed), state, self.source.images(self.indices(step)))
            state, metrics = jax.tree.map(lambda leaf: leaf[0], stepped)
        return state, metrics


@pytest.fixture(scope="module")
def steps_of(tiny):
    """A function of changes: the steps of the tiny config with them."""
    return lambda **changes: Steps(tiny(**changes))


@pytest.fixture(scope="module")
def steps(steps_of):
    return steps_of()


def assert_same_parameters(a, b):
    # Adam divides by √v, so a rounding in a gradient near 0 may move a parameter by a part of the learning rate.
    for one, other in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("changes", [{"model__network": DROPOUT}, pytest.param(UNET, marks=pytest.mark.slow)])
def test_eight_devices_take_the_same_steps_as_one(changes, steps_of):
    """With dropout, which must not depend on the device that an example comes to."""
    steps = steps_of(**changes)
    many, metrics = steps.on_all_devices(3)
    one, one_metrics = steps.on_one_device(3)
    np.testing.assert_allclose(metrics["loss"][0], one_metrics["loss"], rtol=1e-5)
    for leaf in jax.tree.leaves(many.leaves.params):
        copies = np.asarray(leaf)
        np.testing.assert_array_equal(copies, np.broadcast_to(copies[:1], copies.shape))  # replicas stay equal
    assert_same_parameters(many.host(), one)


def test_accumulated_gradients_are_the_batch_gradient(steps_of):
    """With dropout, which must not depend on the microbatch that an example comes to."""
    at_once, metrics = steps_of(model__network=DROPOUT).on_one_device(2)
    in_parts, part_metrics = steps_of(model__network=DROPOUT, train__grad_accum=2).on_one_device(2)
    np.testing.assert_allclose(metrics["grad_norm"], part_metrics["grad_norm"], rtol=1e-4)
    assert_same_parameters(at_once, in_parts)


def test_several_steps_in_one_call_are_the_same_steps(steps):
    single, _ = steps.on_all_devices(2)
    state = devices.replicate(steps.start)
    both, metrics = steps.pmapped(state, steps.batch(steps.indices(0, 1)))
    metrics = metrics.host()
    assert metrics["loss"].shape == (2,)
    norms = group_norms(steps.start.params)  # those before the call, for both of its steps
    np.testing.assert_allclose(metrics["param_norms"], np.broadcast_to(norms, (2, len(norms))), rtol=1e-5)
    assert_same_parameters(single.host(), both.host())


def test_batches_from_disk_are_those_of_the_devices_bit_by_bit(steps):
    from_disk, indices = parallel.streamed(steps.source), steps.indices(0, 1)
    batch = from_disk(indices)
    assert batch.images.shape == (8, 2 * 2, 8, 8, 1), "a device gets its share of both steps and no more"
    states = []
    for made in (batch, steps.batch(indices)):
        state, metrics = steps.pmapped(devices.replicate(steps.start), made)
        states.append((state.host(), metrics.host()))
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_from_disk_a_process_reads_the_shares_of_its_own_devices(steps, monkeypatch):
    """Of two processes with eight devices each, as the second one sees it."""
    read, images = [], Source.images
    monkeypatch.setattr(Source, "images", lambda source, rows: read.append(rows) or images(source, rows))
    monkeypatch.setattr(jax, "device_count", lambda: 16)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    indices = np.arange(64, dtype=np.int32).reshape(2, 32)
    batch = parallel.streamed(steps.source)(indices)
    assert sorted(read[0]) == [*range(16, 32), *range(48, 64)]
    for device in range(8):
        for step in range(2):
            taken = np.asarray(batch.images)[device][np.asarray(batch.indices)[device, step]]
            np.testing.assert_array_equal(taken, steps.source.pixels[indices[step, 16 + 2 * device :][:2]])


@pytest.fixture
def compiled():
    """The seconds of every compilation from now on."""
    found = []

    def listen(event, seconds, **kwargs):
        if "backend_compile" in event:
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return found


def test_the_step_compiles_once_moves_nothing_and_reuses_the_state(steps, compiled):
    state = devices.replicate(steps.start)
    train_steps, counts = parallel.train_steps(steps.experiment.training, steps.config.seed), []
    for step in range(4):
        # What a call moves between host and devices, or between devices, must be asked for: the indices alone are.
        indices, before = steps.indices(step), state
        with jax.transfer_guard("disallow" if step else "allow"):
            state, _ = train_steps(state, steps.batch(indices))
        counts.append(len(compiled))
        leaves = jax.tree.leaves(before.leaves)
        assert all(leaf.is_deleted() for leaf in leaves), "the state's memory was not donated"
    assert counts[0] > 0, "the listener heard nothing"
    assert counts[1:] == [counts[0]] * 3


def test_calls_of_two_lengths_compile_once_each(steps, compiled):
    state = devices.replicate(steps.start)
    train_steps, counts, taken = parallel.train_steps(steps.experiment.training, steps.config.seed), [], 0
    for length in (2, 1, 2, 1, 1, 2):
        state, _ = train_steps(state, steps.batch(steps.indices(*range(taken, taken + length))))
        taken += length
        counts.append(len(compiled))
    assert 0 < counts[0] < counts[1]
    assert counts[2:] == 4 * [counts[1]]


def test_a_replica_that_differs_is_named():
    names = parallel.differing_replicas()
    replicated = devices.replicate({"kernel": np.ones(5, np.float32), "count": np.int32(3)})
    assert names(replicated) == []
    copies = np.array(replicated.leaves["kernel"])
    copies.view(np.uint32)[6, 2] ^= 1  # the last bit of one number of one device
    kernel = jax.device_put(copies, replicated.leaves["kernel"].sharding)
    assert names(devices.Replicated(replicated.leaves | {"kernel": kernel})) == ["kernel"]


def test_a_batch_that_the_devices_cannot_share_is_refused_by_name():
    parallel.check_batch_size(16, 2)
    with pytest.raises(ValueError, match="train.batch_size=12 does not divide by 8 devices"):
        parallel.check_batch_size(12, 1)
    with pytest.raises(ValueError, match=r"train.batch_size=16 does not divide by 8 devices × train.grad_accum=4"):
        parallel.check_batch_size(16, 4)
