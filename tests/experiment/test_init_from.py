"""config.init_from: published weights are scored, sampled and trained from; a run's are where another run starts."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cifar10
from diffusion import data, interop
from diffusion.experiment import build, init_from, workdir
from diffusion.networks.adm import ADM
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
        ({"unet__channels": 16}, (16, 16, 3), "unet.channels: 8 there, 16 here; with init_adapt=True"),
        ({"unet__norm_eps": 1e-5}, (16, 16, 3), "unet.norm_eps: 1e-06 there, 1e-05 here; with"),
        (
            {"unet__num_heads": 2, "unet__num_res_blocks": 2},
            (16, 16, 3),
            "unet.num_heads: 1 there, 2 here; unet.num_res_blocks: 1 there, 2 here; with",
        ),
        (
            {"model__variance": "learned", "objective__name": "vlb"},
            (16, 16, 3),
            "unet.out_channels: 3 there, 6 here; with",
        ),
        ({}, (32, 32, 3), r"config's: down_1_attention_0/key/bias \(8,\) there, not here; .* and \d+ more; with"),
        ({}, (16, 16, 1), "unet.out_channels: 3 there, 1 here; with"),
    ],
)
def test_another_network_is_refused_by_field(tiny, keys, image_shape, words):
    with pytest.raises(ValueError, match=words) as error:
        _ = build.experiment(tiny(**keys), image_shape, 256).start
    assert str(error.value).startswith("init_from=")


def test_a_file_of_openai_s_programs_is_found_with_its_flags(monkeypatch, tmp_path):
    flags = {"package": "improved_diffusion", "image_size": "32", "learn_sigma": "True", "diffusion_steps": 4000}
    (tmp_path / "ema.json").write_text(json.dumps(flags))
    kernel = np.ones((1, 2), np.float32)
    adm = ADM(channel_mult=(1, 2, 2, 2), num_res_blocks=2)
    monkeypatch.setattr(interop, "load_adm", lambda path, flags: (adm, {"conv_in": {"kernel": kernel}}))
    found, there = init_from._published(str(tmp_path / "ema.pt"))
    np.testing.assert_array_equal(found["conv_in/kernel"], kernel)
    assert there["adm.channel_mult"] == (1, 2, 2, 2) and "unet.channels" not in there
    process = {"model.prediction": "eps", "model.variance": "learned_range", "model.conditioning": "t"}
    process |= {"model.rescale_t": True, "schedule.num_steps": 4000}
    assert process.items() <= there.items()
    with pytest.raises(FileNotFoundError, match="other.json does not exist; it must hold the flags"):
        init_from._published(str(tmp_path / "other.pt"))
    (tmp_path / "ema.json").write_text('{"colour": 1, "package": "improved_diffusion"}')
    with pytest.raises(ValueError, match="ema.json: improved_diffusion has no flag colour"):
        init_from._published(str(tmp_path / "ema.pt"))


def test_a_directory_without_weights_is_refused_before_anything_is_written(tiny, pictures, tmp_path):
    for mode in (evaluate, sample):
        with pytest.raises(FileNotFoundError, match=f"{tmp_path / 'none'}/config.json does not exist"):
            mode.run(tiny(init_from=str(tmp_path / "none")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- a run as the start of another


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run with a learned schedule and two checkpoints, of which step 3 is the best; its EMA by step."""
    directory = tmp_path_factory.mktemp("source") / "run"
    config = made()
    start = jax.device_get(build.experiment(config, (16, 16, 3), 256).initial_state())
    workdir.claim(config, directory)
    emas = {step: jax.tree.map(lambda leaf, step=step: leaf + np.float32(step), start.params) for step in (3, 6)}
    with Checkpoints(directory / "checkpoints") as checkpoints:
        for step, ema in emas.items():
            checkpoints.save(step, start.replace(step=np.int32(step), ema_params=ema), {"val_loss": float(step)})
    return directory, emas


def made(**keys):
    config = cifar10.get_config()
    small = {"schedule.num_steps": 5, "schedule.name": "learned(start='cosine')", "objective.name": "vlb"}
    small |= {"model.prediction": "v"}
    small |= {f"unet.{field}": value for field, value in FIELDS.items()}
    with config.unlocked():
        config.update_from_flattened_dict(small | {key.replace("__", "."): value for key, value in keys.items()})
    return config


def from_run(directory, num_classes=0, **keys):
    return build.experiment(made(init_from=str(directory), **keys), (16, 16, 3), 256, num_classes)


@pytest.mark.parametrize(("ending", "step"), [("", 6), ("@latest", 6), ("@best", 3), ("@3", 3)])
def test_a_run_starts_at_the_ema_of_the_checkpoint_that_is_named(ending, step, source):
    directory, emas = source
    state = from_run(f"{directory}{ending}", seed=1).initial_state()
    assert tree_sha256(state.params) == tree_sha256(state.ema_params) == tree_sha256(emas[step])
    assert state.step == 0 and not np.any(jax.tree.leaves(state.opt_state)[1])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"model__variance": "learned_range"}, r"conv_out/bias \(3,\) there, \(6,\) here; conv_out/kernel .*; with"),
        ({"model__prediction": "eps"}, "model.prediction: 'v' there, 'eps' here; with init_adapt=True"),
        ({"schedule__num_steps": 9}, "schedule.num_steps: 5 there, 9 here; with init_adapt=True"),
    ],
)
def test_another_network_is_refused_unless_it_may_be_adapted(keys, words, source):
    with pytest.raises(ValueError, match=words):
        _ = from_run(source[0], **keys).start
    start = from_run(source[0], init_adapt=True, **keys).start
    assert len(start.leaves) > 40


def test_where_there_is_nothing_to_start_from_the_name_is_said(source):
    with pytest.raises(ValueError, match="after the @ comes latest, best or the step"):
        _ = from_run(f"{source[0]}@bets").start
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 4"):
        _ = from_run(f"{source[0]}@4").start


def test_a_learned_variance_starts_in_the_middle_of_its_range_beside_the_trained_mean(source):
    directory, emas = source
    wider = from_run(directory, init_adapt=True, model__variance="learned_range")
    assert wider.start.resized == ["conv_out/bias", "conv_out/kernel"] and not wider.start.anew
    params, old = wider.initial_state().params, from_run(directory)
    for name in ("kernel", "bias"):
        leaf = params["conv_out"][name]
        np.testing.assert_array_equal(leaf[..., :3], emas[6]["conv_out"][name])
        assert not leaf[..., 3:].any()
    x, network_t = jax.random.normal(jax.random.key(1), (2, 16, 16, 3)), jnp.array([1.0, 3.0])
    new_output, old_output = (
        jax.jit(lambda of: of.denoise(x, network_t))(of.model(of.initial_state().params)) for of in (wider, old)
    )
    np.testing.assert_allclose(new_output[..., :3], old_output, rtol=1e-5, atol=1e-5 * np.abs(old_output).max())
    assert not np.any(new_output[..., 3:])


def test_a_variance_that_is_learned_in_another_way_is_another_network(source, tmp_path):
    wide = from_run(source[0], init_adapt=True, model__variance="learned_range")
    workdir.claim(wide.config, tmp_path / "run")
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(1, jax.device_get(wide.initial_state()), {})
    with pytest.raises(ValueError, match="model.variance: 'learned_range' there, 'learned' here"):
        _ = from_run(tmp_path / "run", model__variance="learned").start


def test_validation_images_that_the_old_run_was_trained_on_are_told(source, caplog):
    _ = from_run(source[0]).start
    assert "validation" not in caplog.text
    _ = from_run(source[0], data__validation=5).start
    assert "has seen validation images of data.validation=5" in caplog.text


def test_a_damaged_config_is_named(source, tmp_path):
    shutil.copytree(source[0], tmp_path / "run@home")
    (tmp_path / "run@home" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"run@home/config.json is damaged: it is not the JSON of a config"):
        _ = from_run(tmp_path / "run@home").start


def test_labels_are_added_and_dropped_and_the_rest_is_taken(source, tmp_path):
    directory, emas = source
    labelled = from_run(directory, num_classes=10, init_adapt=True, model__conditional=True, data__name="digits")
    assert labelled.start.anew == ["label/embedding"] and not labelled.start.unused
    assert labelled.start.described().endswith(" parameters are taken; new: label/embedding")
    state = jax.device_get(labelled.initial_state())
    anew = build.experiment(labelled.config.copy_and_resolve_references(), (16, 16, 3), 256, 10)
    with anew.config.unlocked():
        anew.config.init_from = ""
    np.testing.assert_array_equal(state.params["label"]["embedding"], anew.initial_state().params["label"]["embedding"])
    np.testing.assert_array_equal(state.params["conv_in"]["kernel"], emas[6]["conv_in"]["kernel"])

    workdir.claim(labelled.config, tmp_path / "labelled")
    with Checkpoints(tmp_path / "labelled" / "checkpoints") as checkpoints:
        checkpoints.save(1, state, {})
    dropped = from_run(tmp_path / "labelled", init_adapt=True).start
    assert dropped.unused == ["label/embedding"] and not dropped.anew


def test_a_run_that_has_a_checkpoint_does_not_need_what_it_started_from(source, tmp_path):
    shutil.copytree(source[0], tmp_path / "old")
    experiment = from_run(tmp_path / "old")
    state = jax.device_get(experiment.initial_state()).replace(step=np.int32(2))
    workdir.claim(experiment.config, tmp_path / "new")
    with Checkpoints(tmp_path / "new" / "checkpoints") as checkpoints:
        checkpoints.save(2, state, {})
    shutil.rmtree(tmp_path / "old")
    assert workdir.restore(from_run(tmp_path / "old"), tmp_path / "new").step == 2
