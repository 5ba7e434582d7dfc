"""The stated device memory equals the used memory: the state once, and the training images."""

import gc
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import toy
from flax import linen as nn

from configs import cifar10
from diffusion import data
from diffusion.data import Source
from diffusion.data.source import Splits
from diffusion.evaluation.sampling import Sampler
from diffusion.experiment import build, memory, workdir
from diffusion.networks import NETWORKS
from diffusion.programs import describe, sample, train
from diffusion.runtime.checkpoint import Checkpoints
from diffusion.runtime.preemption import Preemption
from diffusion.training import loop

GOLDEN = Path(__file__).parents[1] / "golden"
MIB, GIB = 2**20, 2**30


class Wide(nn.Module):
    """The toy's layer beside 1 MiB of parameters, so that one copy too many is seen."""

    out_channels: int = 2

    def check(self, image_shape: tuple[int, ...]) -> None:
        """It fits images of any shape."""

    @nn.compact
    def __call__(self, x, network_t, dropout_keys=None):
        self.param("wide", nn.initializers.zeros, (MIB // 4,))
        return toy.Layer(out_channels=self.out_channels, name="layer")(x, network_t)


@pytest.fixture
def wide():
    """A function of changes: an experiment with that network."""
    NETWORKS["wide"] = Wide

    def experiment(**keys):
        every = {f"train__{name}_every": 2 for name in ("log", "sample", "checkpoint")}
        return toy.experiment(model__network="wide", **every | keys)

    yield experiment
    del NETWORKS["wide"]


def bytes_alive() -> dict[jax.Device, int]:
    """Of all JAX arrays, on every device; what several arrays share counts once."""
    gc.collect()
    shards = [shard.data for array in jax.live_arrays() for shard in array.addressable_shards]
    sizes = {(data.device, data.unsafe_buffer_pointer()): data.nbytes for data in shards}
    alive = dict.fromkeys(jax.devices(), 0)
    for (device, _), size in sizes.items():
        alive[device] += size
    return alive


@pytest.fixture
def measured(monkeypatch):
    """What the devices hold while test images are scored and samples drawn, beyond what they held before training."""
    before, found, monitor = bytes_alive(), [], loop.monitor

    def note():
        found.append({device: size - before[device] for device, size in bytes_alive().items()})

    def batches(sampler, model, num_images, is_done=None):
        note()
        yield np.arange(num_images), np.zeros((num_images, *toy.SHAPE), np.uint8)

    def noted_monitor(*args):
        of_params = monitor(*args)

        def noted(params):
            note()
            return of_params(params)

        return noted

    monkeypatch.setattr(Sampler, "batches", batches)
    monkeypatch.setattr(loop, "monitor", noted_monitor)
    return found


@pytest.mark.slow
def test_in_training_a_device_holds_the_state_once_and_the_images(wide, measured, tmp_path):
    images = np.random.default_rng(0).integers(0, toy.LEVELS, (2**15, *toy.SHAPE), np.uint8)  # 2 MiB
    splits = Splits(Source("toy", "train", images, toy.LEVELS), toy.source("validation"), toy.source("test"))
    # What a step needs besides, the gradient, is not there between two steps.
    experiment = wide()
    state = memory.state_bytes(experiment) - memory.num_bytes(experiment.abstract_state().params)
    expected = state + memory.data_bytes(experiment, len(splits.train))
    assert 6 * MIB < expected < 6.1 * MIB
    slack = MIB // 4  # the schedule's tables, random keys, metrics and the scored images

    for num_steps in (4, 8):  # from the start, then from a checkpoint
        measured.clear()
        experiment = wide(train__num_steps=num_steps, optim__decay="constant")
        with Preemption() as preemption, workdir.owned(experiment.config, tmp_path) as directory:
            train.train(experiment, directory, splits, sample.make_sampler(experiment), preemption)
        # At steps 2 and 4, or 6 and 8, and drawings before the last one: the second leg draws the step it starts from.
        assert len(measured) == {4: 3, 8: 4}[num_steps]
        for alive in measured:
            for size in alive.values():
                assert expected <= size < expected + slack


def device_with(**stats):
    return SimpleNamespace(memory_stats=lambda: stats or None)


@pytest.mark.parametrize(
    ("placement", "device", "kept_images"),
    [
        ("auto", device_with(bytes_limit=80 * GIB, bytes_in_use=16 * GIB), 16 * GIB // 64),
        ("auto", device_with(), 4 * GIB // 64),
        ("devices", device_with(), 10**12),
        ("disk", device_with(), 0),
    ],
)
def test_images_stay_on_the_devices_if_they_take_a_quarter_of_the_free_memory(
    placement, device, kept_images, wide, monkeypatch
):
    experiment = wide(data__placement=placement)
    monkeypatch.setattr(jax, "local_devices", lambda: [device_with(bytes_limit=2**50, bytes_in_use=0), device])
    assert memory.keeps_images(experiment, kept_images) or not kept_images
    assert not memory.keeps_images(experiment, kept_images + 1) or placement == "devices"


def test_what_a_run_goes_on_from_is_on_the_host(wide, tmp_path):
    experiment = wide()
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        start = train.resume(experiment, checkpoints)
        checkpoints.save(2, start.replace(step=np.int32(2)), {})
        checkpoints.wait()
        resumed = train.resume(experiment, checkpoints)
    assert (start.step, resumed.step) == (0, 2)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves((start, resumed)))
    jax.tree.map(np.testing.assert_array_equal, start.params, experiment.initial_state().params)


def test_published_weights_wait_on_the_host(tmp_path):
    shutil.copyfile(GOLDEN / "unet_tiny.json", tmp_path / "config.json")
    shutil.copyfile(GOLDEN / "unet_tiny.safetensors", tmp_path / "diffusion_pytorch_model.safetensors")
    config = cifar10.get_config()
    same = {"unet.channels": 8, "unet.attention_resolutions": (8,), "unet.num_groups": 4, "init_from": str(tmp_path)}
    with config.unlocked():
        config.update_from_flattened_dict(same)
    leaves = build.experiment(config, (16, 16, 3), 256).start.leaves
    assert leaves and all(isinstance(leaf, np.ndarray) for leaf in leaves.values())


def test_describe_counts_the_training_images(tiny, monkeypatch, capsys, tmp_path):
    described = data.Description("many", 2**24, 9, toy.SHAPE, toy.LEVELS, 0)  # of 64 bytes each: 1 GiB
    monkeypatch.setattr(data, "describe", lambda *args: described)
    describe.run(tiny(unet__channel_mult=(1,), unet__attention_resolutions=()), tmp_path)
    printed = capsys.readouterr().out
    sizes = dict(re.findall(r"^  (.*?) +(\d+\.\d\d) GiB$", printed, re.MULTILINE))
    assert sizes["all training images"] == "1.00"
    assert sizes.keys() == {"parameters, EMA, Adam, gradients", "all training images", "kept for the backward pass"}
    at_most = float(re.search(r"at most (\d+\.\d\d) GiB", printed).group(1))
    assert at_most == pytest.approx(sum(map(float, sizes.values())), abs=0.02)


def test_from_disk_the_images_of_the_calls_under_way_are_counted(wide):
    experiment = wide(data__placement="disk", train__batch_size=64)
    # Four calls of one step, each with an eighth of 64 images of 64 bytes.
    assert memory.data_bytes(experiment, 10**9) == 4 * 8 * 64


def test_the_error_about_memory_counts_the_training_images(wide):
    with pytest.raises(MemoryError, match="optimizer and gradients and 1.00 GiB of training images; set"):
        with memory.shortage_explained(wide(), num_train=2**24):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")


def test_a_run_tells_the_error_how_many_training_images_there_are(tiny, monkeypatch, tmp_path):
    def out_of_memory(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(train, "train", out_of_memory)
    with pytest.raises(MemoryError, match=r"and 0.00 GiB of training images; set"):
        train.run(tiny(), tmp_path / "run")
