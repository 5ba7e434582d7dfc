"""config.init_from: published weights are scored, sampled and trained from as if they were a checkpoint's."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cifar10
from diffusion import data, interop
from diffusion.experiment import build, workdir
from diffusion.networks.unet import UNet
from diffusion.programs import evaluate, sample
from diffusion.runtime.checkpoint import Checkpoints
from diffusion.runtime.digests import tree_sha256

# Attention at height 8: of images of 16 × 16 the second level, of larger ones the third.
FIELDS = {"channels": 8, "channel_mult": (1, 1, 1), "num_res_blocks": 1, "attention_resolutions": (8,), "num_groups": 4}


@pytest.fixture(scope="module")
def network():
    """A small U-Net and its parameters."""
    unet = UNet(**FIELDS, dropout=0.0)
    return unet, jax.jit(unet.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), jnp.zeros(1))["params"]


@pytest.fixture(scope="module")
def published(network, tmp_path_factory):
    """A directory with it under the published names."""
    directory = tmp_path_factory.mktemp("published")
    interop.save_diffusers(directory, *network, sample_size=16)
    return directory


@pytest.fixture(scope="module")
def tiny(published):
    """A function of changes: the config whose network is the published one."""

    def config_with(**keys):
        config = cifar10.get_config()
        same = {"init_from": str(published), "schedule.num_steps": 25, "eval.num_images": 9, "sample.num_images": 8}
        same |= {f"unet.{field}": value for field, value in FIELDS.items()}
        with config.unlocked():
            config.update_from_flattened_dict(same | {key.replace("__", "."): value for key, value in keys.items()})
        return config

    return config_with


@pytest.fixture
def pictures(monkeypatch):
    """A data set of 16 × 16 pictures."""
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), np.uint8)
    monkeypatch.setattr(data, "load", lambda name, split, *_: data.Source(name, split, images))
    monkeypatch.setattr(data, "describe", lambda name, *_: data.Description(name, 12, 12, (16, 16, 3), 256, 0))


def test_the_start_is_the_published_network_and_its_ema(tiny, network):
    experiment = build.experiment(tiny(), (16, 16, 3), 256)
    state, (unet, params) = experiment.initial_state(), network
    x, network_t = jax.random.normal(jax.random.key(1), (2, 16, 16, 3)), jnp.array([3.0, 20.0])
    wanted = jax.jit(unet.apply)({"params": params}, x, network_t)
    output = jax.jit(lambda model: model.denoise(x, network_t))(experiment.model(state.ema_params))
    assert np.linalg.norm(output - wanted) < 1e-4 * np.linalg.norm(wanted)
    jax.tree.map(np.testing.assert_array_equal, state.params, state.ema_params)
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, state, experiment.abstract_state())
    assert jax.tree.all(same)


def test_weights_are_scored_and_sampled_without_a_checkpoint(tiny, network, published, pictures, tmp_path, capsys):
    config = tiny()
    evaluate.run(config, tmp_path / "run")
    printed = json.loads(capsys.readouterr().out)
    assert printed["ema_sha256"] == tree_sha256(network[1]) and printed["test_images"] == 9 and printed["step"] == 0
    assert list((tmp_path / "run" / "evaluations").glob("*/bpd.npz")) and not workdir.is_finished(tmp_path / "run")
    sample.run(config, tmp_path / "run")
    assert np.load(tmp_path / "run" / "samples.npz")["images"].shape == (8, 16, 16, 3)
    with pytest.raises(ValueError, match=r"another config \(init_from: .*published.* → .*other"):
        evaluate.run(tiny(init_from=str(shutil.copytree(published, tmp_path / "other"))), tmp_path / "run")


def test_reading_the_weights_of_a_run_that_is_there_writes_nothing(tiny, tmp_path):
    experiment = build.experiment(tiny(), (16, 16, 3), 256)
    workdir.claim(tiny(), tmp_path / "run")
    before = (tmp_path / "run" / "config.json").stat()
    assert workdir.restore(experiment, tmp_path / "run").step == 0
    after = (tmp_path / "run" / "config.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_a_checkpoint_that_was_trained_from_them_comes_first(tiny, tmp_path):
    experiment = build.experiment(tiny(), (16, 16, 3), 256)
    trained = jax.device_get(experiment.initial_state()).replace(step=np.int32(7))
    workdir.claim(tiny(), tmp_path / "run")
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(7, trained, {"val_loss": 1.0})
    assert workdir.restore(experiment, tmp_path / "run").step == 7


@pytest.mark.parametrize(
    ("keys", "image_shape", "words"),
    [
        ({"unet__channels": 16}, (16, 16, 3), "unet.channels: 8 there, 16 here$"),
        ({"unet__norm_eps": 1e-5}, (16, 16, 3), "unet.norm_eps: 1e-06 there, 1e-05 here$"),
        (
            {"unet__num_heads": 2, "unet__num_res_blocks": 2},
            (16, 16, 3),
            "unet.num_res_blocks: 1 there, 2 here; unet.num_heads: 1 there, 2 here$",
        ),
        ({"model__variance": "learned", "objective__name": "vlb"}, (16, 16, 3), "unet.out_channels: 3 there, 6 here$"),
        ({}, (32, 32, 3), r"images are \(32, 32, 3\): down_1_attention_0/key/bias, .*down_2_attention_0/key/bias"),
        ({}, (16, 16, 1), "images are .*conv_in/kernel, conv_out/bias, conv_out/kernel differ|unet.out_channels"),
    ],
)
def test_another_network_is_refused_by_field(tiny, keys, image_shape, words):
    with pytest.raises(ValueError, match=words) as error:
        build.experiment(tiny(**keys), image_shape, 256)
    assert str(error.value).startswith("init_from=")


def test_a_directory_without_weights_is_refused_before_anything_is_written(tiny, pictures, tmp_path):
    for mode in (evaluate, sample):
        with pytest.raises(FileNotFoundError, match=f"{tmp_path / 'none'}/config.json does not exist"):
            mode.run(tiny(init_from=str(tmp_path / "none")), tmp_path / "run")
    assert not (tmp_path / "run").exists()
