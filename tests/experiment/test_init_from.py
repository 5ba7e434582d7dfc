"""config.init_from: published weights are scored, sampled and trained from, and a run starts from another run."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from configs import cifar10
from diffusion import data, interop, schedules
from diffusion.experiment import build, init_from, workdir
from diffusion.interop import diffusers
from diffusion.networks.adm import ADM
from diffusion.networks.unet import UNet
from diffusion.programs import evaluate, sample, train
from diffusion.reporting.summary import Stopwatch
from diffusion.runtime.checkpoint import Checkpoints, has_begun
from diffusion.runtime.digests import tree_sha256

# Attention at height 8: the second level of images of 16 × 16, the first of images of 8 × 8.
FIELDS = {"channels": 8, "channel_mult": (1, 1), "num_res_blocks": 1, "attention_resolutions": (8,), "num_groups": 4}


@pytest.fixture(scope="module", autouse=True)
def shapes_are_traced_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers, "_param_shapes", functools.cache(diffusers._param_shapes))
        yield


@pytest.fixture(scope="module")
def network():
    """A small U-Net, parameters that are random numbers, and an input with its output."""
    unet, rng = UNet(**FIELDS, dropout=0.0), np.random.default_rng(0)
    shapes = diffusers._param_shapes(unet, (16, 16, 3))
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype), shapes)
    inputs = jax.random.normal(jax.random.key(1), (2, 16, 16, 3)), jnp.array([3.0, 20.0])
    return unet, params, inputs, jax.jit(unet.apply)({"params": params}, *inputs)


@pytest.fixture(scope="module")
def published(network, tmp_path_factory):
    """A directory with it under the published names."""
    directory = tmp_path_factory.mktemp("published")
    interop.save_diffusers(directory, *network[:2], sample_size=16)
    return directory


@pytest.fixture(scope="module")
def tiny(published):
    """A function of changes: the config whose network is the published one."""

    def config_with(**keys):
        config = cifar10.get_config()
        same = {"init_from": str(published), "schedule.num_steps": 25}
        same |= {f"unet.{field}": value for field, value in FIELDS.items()}
        with config.unlocked():
            config.update_from_flattened_dict(same | {key.replace("__", "."): value for key, value in keys.items()})
        return config

    return config_with


def output_of(experiment, inputs):
    """The output of the network that training starts with."""
    model = experiment.model(experiment.initial_state().ema_params)
    return np.asarray(jax.jit(lambda model: model.denoise(*inputs))(model))


def test_the_start_is_the_published_network_and_its_ema(tiny, network):
    experiment = build.experiment(tiny(), (16, 16, 3), 256)
    state, (_, params, inputs, wanted) = experiment.initial_state(), network
    assert np.linalg.norm(output_of(experiment, inputs) - wanted) < 1e-4 * np.linalg.norm(wanted)
    assert tree_sha256(state.params) == tree_sha256(state.ema_params) == tree_sha256(params)
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, state, experiment.abstract_state())
    assert jax.tree.all(same)


def test_a_learned_variance_starts_in_the_middle_of_its_range_beside_the_trained_mean(tiny, network):
    learned = {"model__variance": "learned_range", "objective__name": "vlb"}
    wider = build.experiment(tiny(init_adapt=True, **learned), (16, 16, 3), 256)
    assert wider.start.resized == ["conv_out/bias", "conv_out/kernel"] and not wider.start.anew
    params, (_, old, inputs, wanted) = wider.initial_state().params, network
    for name in ("kernel", "bias"):
        leaf = params["conv_out"][name]
        np.testing.assert_array_equal(leaf[..., :3], old["conv_out"][name])
        assert not leaf[..., 3:].any()
    output = output_of(wider, inputs)
    assert np.linalg.norm(output[..., :3] - wanted) < 1e-4 * np.linalg.norm(wanted) and not output[..., 3:].any()


def test_reading_the_weights_of_a_run_that_is_there_writes_nothing(tiny, network, tmp_path):
    experiment = build.experiment(tiny(), (16, 16, 3), 256)
    workdir.claim(tiny(), tmp_path / "run")
    before = (tmp_path / "run" / "config.json").stat()
    read = workdir.restore(experiment, tmp_path / "run")
    assert read.step == 0 and read.sha256 == tree_sha256(network[1])
    after = (tmp_path / "run" / "config.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("keys", "image_shape", "words"),
    [
        (
            {"unet__channels": 16, "unet__norm_eps": 1e-5, "unet__num_heads": 2},
            (16, 16, 3),
            "unet.channels: 8 there, 16 here; unet.norm_eps: 1e-06 there, 1e-05 here; unet.num_heads: 1 there, 2 here; "
            "with init_adapt=True",
        ),
        (
            {"model__variance": "learned", "objective__name": "vlb"},
            (16, 16, 3),
            "unet.out_channels: 3 there, 6 here; with",
        ),
        ({}, (8, 8, 3), r"config's: down_0_attention_0/key/bias not there, \(8,\) here; .* and \d+ more; with"),
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


@pytest.mark.parametrize("folder", ["", "checkpoints-0", "checkpoints"])
def test_a_vdm_is_refused_by_what_it_is(folder, tmp_path):
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "ckpt-7.flax").touch()
    words = r"is a checkpoint of VDM's code \(ckpt-7.flax\), .* interop.load_vdm reads it"
    with pytest.raises(ValueError, match=words) as error:
        init_from._read(str(tmp_path))
    assert "\n" not in str(error.value)


# --- a run as the start of another; its network is one layer


@pytest.fixture(scope="module")
def source(tmp_path_factory, layer):
    """A run with a learned schedule and two checkpoints, of which step 3 is the best; its EMA by step."""
    directory = tmp_path_factory.mktemp("source") / "run"
    workdir.claim(made(), directory)
    rng, emas = np.random.default_rng(0), {}
    like = build.experiment(made(), toy.SHAPE, toy.LEVELS).abstract_state()
    with Checkpoints(directory / "checkpoints") as checkpoints:
        for step in (3, 6):
            state = jax.tree.map(lambda leaf: np.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), like)
            checkpoints.save(step, state.replace(step=np.int32(step)), {"val_loss": float(step)})
            emas[step] = state.ema_params
    return directory, emas


def made(**keys):
    small = {"model__network": "labelled", "model__variance": "fixed_small", "schedule__num_steps": 5}
    small |= {"schedule__name": "learned(start='cosine')", "objective__name": "vlb"}
    return toy.config(**small | keys)


def from_run(directory, num_classes=0, **keys):
    return build.experiment(made(init_from=str(directory), **keys), toy.SHAPE, toy.LEVELS, num_classes)


def save(experiment, directory, step=1):
    """A run in `directory` that has come to this step."""
    workdir.claim(experiment.config, directory)
    with Checkpoints(directory / "checkpoints") as checkpoints:
        checkpoints.save(step, jax.device_get(experiment.initial_state()).replace(step=np.int32(step)), {})
    return directory


def test_weights_are_scored_and_sampled_without_a_checkpoint(source, tmp_path, monkeypatch, capsys):
    directory, emas = source
    monkeypatch.setattr(data, "load", toy.load)
    monkeypatch.setattr(data, "describe", toy.describe)
    config = made(init_from=str(directory), eval__num_images=9, sample__num_images=8)
    evaluate.run(config, tmp_path / "run")
    printed = json.loads(capsys.readouterr().out)
    assert printed["ema_sha256"] == tree_sha256(emas[6]) and printed["test_images"] == 9 and printed["step"] == 0
    assert list((tmp_path / "run" / "evaluations").glob("*/bpd.npz")) and not workdir.is_finished(tmp_path / "run")
    sample.run(config, tmp_path / "run")
    assert np.load(tmp_path / "run" / "samples.npz")["images"].shape == (8, *toy.SHAPE)
    with pytest.raises(ValueError, match="^ema.length=0.1 needs a run; init_from is no run$"):
        keys = {"ema__post_hoc": (0.05, 0.15), "ema__length": 0.1}
        evaluate.run(made(init_from=str(directory), **keys), tmp_path / "other")
    with pytest.raises(ValueError, match=rf"another config \(init_from: {directory} → {directory}@best"):
        evaluate.run(made(init_from=f"{directory}@best"), tmp_path / "run")


def test_a_run_whose_checkpoints_cannot_be_used_is_not_scored_with_its_start(source, tmp_path, monkeypatch):
    directory, _ = source
    monkeypatch.setattr(data, "load", toy.load)
    monkeypatch.setattr(data, "describe", toy.describe)
    run = save(from_run(directory), tmp_path / "run")
    assert int(workdir.load(run).state.step) == 1
    (run / "checkpoints" / "1" / "state" / "_METADATA").unlink()
    with pytest.raises((FileNotFoundError, ValueError), match="checkpoint"):
        workdir.load(run)
    assert not has_begun(tmp_path / "checkpoints") and has_begun(run / "checkpoints")


def test_for_a_network_that_takes_gamma_the_ends_of_gamma_are_part_of_its_meaning():
    """They scale γ, so that with others the same noise reaches the network as another number."""

    def settings(**keys):
        config = toy.config(model__conditioning="gamma", **keys)
        return init_from._all_settings(config)[init_from.ENDS]

    linear = settings(schedule__name="linear", schedule__num_steps=1000)
    schedule = schedules.linear(1000)
    np.testing.assert_allclose(linear, (-schedule[1].log_snr, -schedule[1000].log_snr), atol=1e-3)
    assert settings(schedule__name="linear", schedule__num_steps=100) != linear
    assert init_from.ENDS not in init_from._all_settings(toy.config())


def test_a_directory_without_weights_is_refused_before_anything_is_written(tmp_path, monkeypatch, layer):
    monkeypatch.setattr(data, "describe", toy.describe)
    for mode in (evaluate, sample):
        with pytest.raises(FileNotFoundError, match="none' does not exist; it may be a run"):
            mode.run(made(init_from=str(tmp_path / "none")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("ending", "step"), [("", 6), ("@latest", 6), ("@best", 3), ("@3", 3)])
def test_a_run_starts_at_the_ema_of_the_checkpoint_that_is_named(ending, step, source):
    directory, emas = source
    state = from_run(f"{directory}{ending}", seed=1).initial_state()
    assert tree_sha256(state.params) == tree_sha256(state.ema_params) == tree_sha256(emas[step])
    assert state.step == 0 and not np.any(jax.tree.leaves(state.opt_state)[1])


LAST_LAYERS = [f"layer/{name}/{leaf}" for name in ("pixel", "time") for leaf in ("bias", "kernel")]


@pytest.mark.parametrize(
    ("keys", "words", "resized", "anew"),
    [
        (
            {"model__variance": "learned_range"},
            r"layer/pixel/bias \(1,\) there, \(2,\) here; layer/pixel/kernel .*; with",
            LAST_LAYERS,
            [],
        ),
        ({"model__prediction": "eps"}, "model.prediction: 'v' there, 'eps' here; with init_adapt=True", [], []),
        (
            {"schedule__num_steps": 9},
            "schedule.num_steps: 5 there, 9 here; with init_adapt=True",
            [],
            ["schedule/logits"],
        ),
    ],
)
def test_another_network_is_refused_unless_it_may_be_adapted(keys, words, resized, anew, source):
    with pytest.raises(ValueError, match=words):
        _ = from_run(source[0], **keys).start
    start = from_run(source[0], init_adapt=True, **keys).start
    assert (start.resized, start.anew) == (resized, anew) and len(start.leaves) + len(anew) == 7


def test_where_there_is_nothing_to_start_from_the_name_is_said(source):
    with pytest.raises(ValueError, match="the part after @ must be latest, best or the step"):
        _ = from_run(f"{source[0]}@bets").start
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 4"):
        _ = from_run(f"{source[0]}@4").start


def test_a_variance_that_is_learned_in_another_way_is_another_network(source, tmp_path):
    wide = save(from_run(source[0], init_adapt=True, model__variance="learned_range"), tmp_path / "run")
    with pytest.raises(ValueError, match="model.variance: 'learned_range' there, 'learned' here"):
        _ = from_run(wide, model__variance="learned").start


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
    labelled = from_run(directory, num_classes=10, init_adapt=True, model__conditional=True)
    assert labelled.start.anew == ["label/embedding"] and not labelled.start.unused
    assert labelled.start.described().endswith(" parameters are taken; new: label/embedding")
    params = labelled.initial_state().params
    anew = build.experiment(made(model__conditional=True), toy.SHAPE, toy.LEVELS, 10).initial_state().params
    np.testing.assert_array_equal(params["label"]["embedding"], anew["label"]["embedding"])
    assert tree_sha256({name: params[name] for name in emas[6]}) == tree_sha256(emas[6])

    dropped = from_run(save(labelled, tmp_path / "labelled"), init_adapt=True).start
    assert dropped.unused == ["label/embedding"] and not dropped.anew


@pytest.mark.parametrize("checkpoint", ["best", "500"])
def test_the_start_is_not_scored_as_another_checkpoint(checkpoint, source, tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint"):
        workdir.restore(from_run(source[0]), tmp_path / "mistyped", checkpoint)
    assert not (tmp_path / "mistyped" / "config.json").exists()


def test_a_run_says_which_weights_it_started_from(source, tmp_path, capsys):
    """The run that it names may train further."""
    (tmp_path / "new").mkdir()
    with Checkpoints(tmp_path / "new" / "checkpoints") as checkpoints:
        train.resume(from_run(source[0]), checkpoints)
    started = {"init_from": str(source[0]), "sha256": tree_sha256(source[1][6])}
    assert json.loads((tmp_path / "new" / "start.json").read_text()) == started
    assert "parameters are taken" in capsys.readouterr().err
    (tmp_path / "new" / "seconds.json").write_text('{"seconds": 1.0}')
    assert train._about(tmp_path / "new", Stopwatch(tmp_path / "new" / "seconds.json"))["started_from"] == started


def test_a_run_that_has_a_checkpoint_does_not_need_what_it_started_from(source, tmp_path):
    shutil.copytree(source[0], tmp_path / "old")
    save(from_run(tmp_path / "old"), tmp_path / "new", step=2)
    assert workdir.restore(from_run(tmp_path / "old"), tmp_path / "new").step == 2
    shutil.rmtree(tmp_path / "old")
    assert workdir.restore(from_run(tmp_path / "old"), tmp_path / "new").step == 2
