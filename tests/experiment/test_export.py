"""An export equals the model of its run, bit by bit, without the run and its data. Damage prints one line."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from safetensors.numpy import load, save

from diffusion import __version__, data, guidance, likelihood, samplers
from diffusion.experiment import build, export, init_from, schema, workdir
from diffusion.networks import NETWORKS
from diffusion.programs import export as program
from diffusion.programs import fork
from diffusion.runtime import processes
from diffusion.runtime.checkpoint import Checkpoints
from diffusion.runtime.digests import tree_sha256

DATA = {3: {"train": "of 3", "test": "of 3"}, 6: {"train": "of 6", "test": "of 6"}}


def config(**keys):
    learned = {"schedule__name": "learned(start='cosine')", "objective__name": "vlb", "schedule__num_steps": 3}
    return toy.config(**learned | {"data__validation": 5, "data__data_dir": "/home/me/sets"} | keys)


def classes(settings):
    return 10 if settings.model.conditional else 0


def made(directory, settings):
    """A run with two checkpoints, of which step 3 is the best; their EMA are random numbers."""
    experiment, rng = build.experiment(settings, toy.SHAPE, toy.LEVELS, classes(settings)), np.random.default_rng(0)
    workdir.claim(settings, directory)
    like = experiment.abstract_state()
    for step in (3, 6):
        state = jax.tree.map(lambda leaf: np.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), like)
        with Checkpoints(directory / "checkpoints", data_sha256=DATA[step]) as checkpoints:
            checkpoints.save(step, state.replace(step=np.int32(step)), {"val_loss": float(step)})
    return directory


@pytest.fixture(autouse=True)
def toy_networks(monkeypatch):
    monkeypatch.setattr(data, "describe", lambda *_: data.Description("toy", 64, 64, toy.SHAPE, toy.LEVELS, 10))
    for name, network in {"layer": toy.Layer, "labelled": toy.Labelled}.items():
        monkeypatch.setitem(NETWORKS, name, network)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run, the export of its newest checkpoint, and that as it is loaded from the run."""
    directory = tmp_path_factory.mktemp("source")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "describe", toy.describe)
        patch.setitem(NETWORKS, "layer", toy.Layer)
        run = workdir.load(made(directory / "run", config()))
        run.export(directory / "export")
    return directory / "run", directory / "export", run


@pytest.fixture
def exported(source, tmp_path):
    """A copy of the export."""
    return shutil.copytree(source[1], tmp_path / "export")


def edit(exported, **entries):
    """Changes entries of model.json; a dotted name is a config key, and None takes an entry away."""
    said = json.loads((exported / "model.json").read_text())
    for name, value in entries.items():
        group, _, key = name.rpartition("__")
        of = said["config"][group] if group else said
        of.update({key: value})
        if value is None:
            del of[key]
    (exported / "model.json").write_text(json.dumps(said))


def bits(tree):
    return [(leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


@jax.jit
def samples_and_bound(model):
    keys = jax.random.split(jax.random.key(0), 2)
    x0 = jnp.linspace(-1, 1, 17)[jnp.arange(2 * 64).reshape(2, *toy.SHAPE) % 17]
    denoise = guidance.conditional(model.denoise, jnp.array([1, 9]))
    x, _ = samplers.sample(samplers.ancestral(), denoise, model.p, model.schedule, keys, toy.SHAPE)
    return x, likelihood.vlb_terms_bpd(denoise, model.p, model.schedule, x0, keys, toy.LEVELS)


def test_it_is_the_model_of_the_run_bit_by_bit_without_run_and_data(tmp_path, monkeypatch):
    """With labels, a learned schedule and arguments of the network's name."""
    labelled = config(model__network="labelled(dropout=0.2)", model__conditional=True)
    run = workdir.load(made(tmp_path / "run", labelled), "best")
    run.export(tmp_path / "export")
    shutil.rmtree(tmp_path / "run")
    monkeypatch.delattr(data, "describe")
    found = workdir.load(tmp_path / "export")
    assert (found.state.step, found.image_shape, found.directory) == (3, toy.SHAPE, tmp_path / "export")
    assert jax.tree.structure(found.model) == jax.tree.structure(run.model)
    assert bits(found.model) == bits(run.model) and found.state.sha256 == run.state.sha256
    assert bits(samples_and_bound(found.model)) == bits(samples_and_bound(run.model))


def test_the_same_export_gives_the_same_bytes_and_another_one_is_refused(source, exported, tmp_path):
    run_directory, first, run = source
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    assert before.keys() == {"model.json", "model.safetensors"}
    for directory in (exported, tmp_path / "new" / "folder"):
        run.export(directory)
        assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    other = workdir.load(run_directory, "best")
    for name in ("model.safetensors", "model.json"):
        with pytest.raises(ValueError, match=rf"{exported / name} exists and differs from this export's; delete it or"):
            other.export(exported)
        assert (exported / name).read_bytes() == before[name]
        (exported / name).unlink()
    other.export(exported)
    with pytest.raises(ValueError, match="holds a run or published weights"):
        run.export(run_directory)
    with pytest.raises(ValueError, match="config.json is not a directory; export to another one"):
        run.export(run_directory / "config.json")
    with pytest.raises(ValueError, match="is an export already; copy its files"):
        workdir.load(exported).export(tmp_path / "again")


def test_model_json_says_what_a_card_needs_and_no_place_of_this_machine(source, exported, tmp_path):
    run_directory, _, run = source
    said = json.loads((exported / "model.json").read_text())
    assert said["license"] == said["command"] == "" and said["scores"] == {} and said["data_sha256"] == DATA[6]
    assert said["ema_sha256"] == tree_sha256(run.state.ema_params) and said["version"] == __version__
    assert said["config"]["data"]["validation"] == 5 and "/home/me" not in (exported / "model.json").read_text()
    assert said["num_params"] == sum(leaf.size for leaf in jax.tree.leaves(run.state.ema_params))

    copy = shutil.copytree(run_directory, tmp_path / "run")
    best = workdir.load(copy, "best")
    scored = {"test_bpd": 1.5, "test_bpd_stderr": 0.1, "protocol": {"name": "exact"}}
    other = {"seconds": 9.0, "stopped_early": {"validations": 2}}
    (copy / "summary.json").write_text(json.dumps(scored | other | {"ema_sha256": run.state.sha256}))
    values = config(seed=7, data__data_dir="", unet__channel_mult=(1,)).to_dict()
    (copy / "base.json").write_text(json.dumps({"config": "configs/my toy.py", "values": values}))
    (copy / "evaluations" / "a").mkdir(parents=True)
    evaluated = scored | {"test_bpd": 2.5, "ema_sha256": best.state.sha256}
    (copy / "evaluations" / "a" / "eval.json").write_text(json.dumps(evaluated))
    for step, bpd, of in ((6, 1.5, run._replace(directory=copy)), (3, 2.5, best)):
        of.export(tmp_path / str(step), license="CC0")
        said = json.loads((tmp_path / str(step) / "model.json").read_text())
        assert said["scores"] == scored | {"test_bpd": bpd}
        assert (said["license"], said["step"], said["data_sha256"]) == ("CC0", step, DATA[step])
        given = f"--config.seed=0 '--config.unet.channel_mult={run.config.unet.channel_mult}'"
        assert said["command"] == f"python main.py '--config=configs/my toy.py' {given}"


def test_the_command_says_where_a_run_came_from_without_the_place(tmp_path):
    (tmp_path / "base.json").write_text(json.dumps({"config": "configs/toy.py", "values": config().to_dict()}))
    assert export.command_in(tmp_path, config()) == "python main.py --config=configs/toy.py"
    (tmp_path / "fork.json").write_text(json.dumps({"directory": "/home/me/old", "step": 3}))
    started = config(init_from="/home/me/first@best")
    words = "--config.init_from=first@best --fork=old@3"
    assert export.command_in(tmp_path, started) == f"python main.py --config=configs/toy.py {words}"


def change_weights(exported, **tensors):
    held = load((exported / "model.safetensors").read_bytes())
    changed = held | {name.replace("__", "/"): value(held) for name, value in tensors.items()}
    (exported / "model.safetensors").write_bytes(save(changed))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


DAMAGE = {
    "cut": (lambda e: cut(e / "model.safetensors", -4), "model.safetensors: "),
    "empty": (lambda e: cut(e / "model.safetensors", 0), "model.safetensors: "),
    "flipped": (lambda e: flip(e / "model.safetensors"), r"model.safetensors is damaged or another.* \(SHA-256 "),
    "no weights": (lambda e: (e / "model.safetensors").unlink(), "model.safetensors does not exist; an export is"),
    "no json": (lambda e: (e / "model.json").unlink(), "model.json does not exist; an export is"),
    "NaN": (
        lambda e: change_weights(e, pixel__bias=lambda held: held["pixel/bias"] * np.float32("nan")),
        "model.safetensors: NaN or Inf in pixel/bias$",
    ),
    "half": (
        lambda e: change_weights(e, pixel__bias=lambda held: held["pixel/bias"].astype(np.float16)),
        "model.safetensors: the parameters are F16, not F32",
    ),
    "not json": (lambda e: cut(e / "model.json", 99), "model.json: is damaged: it is not the JSON of an export"),
    "no config": (lambda e: edit(e, config=None), "model.json: is damaged: it is not the JSON of an export"),
    "later": (lambda e: edit(e, format=2, version="9.0"), "model.json: has format=2, .* version 9.0 wrote it"),
    "key": (
        lambda e: edit(e, model__later=1, version="9.0"),
        "model.json: has the config key model.later, which version .* does not have; version 9.0 wrote it",
    ),
    "value": (lambda e: edit(e, model__prediction="epsilon"), "model.json: config key model.prediction must be one of"),
    "network": (lambda e: edit(e, model__network="resnet"), "model.json: config key model.network must be one of"),
    "number": (lambda e: edit(e, step="6"), "model.json: step must be an integer in"),
    "image": (lambda e: edit(e, image_shape=[8, 8]), r"model.json: image_shape must be three integers.* not \(8, 8\)"),
    "absent": (lambda e: edit(e, ema_sha256=None), "model.json: ema_sha256 must be a string, not None"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line_that_names_the_file(name, source, exported):
    damage, words = DAMAGE[name]
    damage(exported)
    start = config(init_from=str(exported)), toy.Layer(), source[2].state.ema_params
    for read in (lambda: workdir.load(exported), lambda: init_from.load(*start)):
        with pytest.raises((ValueError, FileNotFoundError), match=rf"^{exported}/{words}") as error:
            read()
        assert "\n" not in str(error.value)


def test_a_tensor_of_another_shape_is_named(exported):
    """Also where the digest says that it is what was exported."""
    change_weights(exported, pixel__bias=lambda held: held["pixel/bias"][:1])
    edit(exported, ema_sha256=tree_sha256(load((exported / "model.safetensors").read_bytes())))
    with pytest.raises(ValueError, match=rf"^{exported}/model.safetensors: pixel/bias is \(1,\) instead of \(2,\)$"):
        workdir.load(exported)
    with pytest.raises(ValueError, match=r"another network than the config's: pixel/bias \(1,\) there, \(2,\) here;"):
        _ = build.experiment(config(init_from=str(exported)), toy.SHAPE, toy.LEVELS).start


def test_the_order_of_an_array_in_memory_is_nothing(source, tmp_path):
    _, exported, run = source
    strided = np.repeat(run.state.ema_params["pixel"]["kernel"], 2, axis=1)[:, ::2]
    params = run.state.ema_params | {"pixel": run.state.ema_params["pixel"] | {"kernel": strided}}
    run._replace(state=run.state.replace(ema_params=params)).export(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()


def test_a_config_that_cannot_be_is_named_with_its_file(exported):
    edit(exported, objective__name="simple")
    with pytest.raises(ValueError, match=rf"^{exported}/model.json: objective.name='simple' "):
        workdir.load(exported)


def test_an_older_export_means_what_the_program_did_before_a_key_existed(exported, monkeypatch):
    """Also where a later version has another default, of the decoder for example."""
    edit(exported, model__decoder=None, train__validate_every=None)
    changed = {"model.decoder": "bayes", "train.validate_every": 7}
    for name, default in changed.items():
        key = schema.KEYS[name]
        monkeypatch.setitem(schema.KEYS, name, key._replace(default=default, before=key.default))
    later = schema.Key("new", schema.TEXT, "what a later version has", before="old")
    monkeypatch.setitem(schema.KEYS, "model.later", later)
    run = workdir.load(exported)
    assert (run.model.p.decoder, run.config.train.validate_every, run.config.model.later) == ("network", 0, "old")


def test_what_fails_while_it_is_written_leaves_nothing(source, tmp_path, monkeypatch):
    fsync, room = os.fsync, []

    def nearly_full(descriptor):
        if not room:
            raise OSError(28, "No space left on device")
        fsync(room.pop() or descriptor)

    monkeypatch.setattr(os, "fsync", nearly_full)
    for written, name in enumerate(("model.safetensors", "model.json")):
        room[:] = [None] * written
        with pytest.raises(OSError, match=f"{name} could not be written .No space left on device"):
            source[2].export(tmp_path / "export")
        assert not list((tmp_path / "export").iterdir())
    with pytest.raises(ValueError, match="model.safetensors: NaN or Inf in time/bias"):
        params = {name: dict(group) for name, group in source[2].state.ema_params.items()}
        params["time"]["bias"] = params["time"]["bias"] * np.float32("inf")
        source[2]._replace(state=source[2].state.replace(ema_params=params)).export(tmp_path / "nan")


def test_another_run_starts_from_it(source, caplog):
    _, exported, run = source
    same = build.experiment(config(init_from=str(exported)), toy.SHAPE, toy.LEVELS)
    state = same.initial_state()
    assert tree_sha256(state.params) == tree_sha256(state.ema_params) == run.state.sha256 and state.step == 0
    assert "validation" not in caplog.text
    keys = {"init_from": str(exported), "model__variance": "fixed_small", "schedule__name": "cosine"}
    with pytest.raises(ValueError, match=r"another network.*pixel/bias \(2,\) there, \(1,\) here; .*; with init_adapt"):
        _ = build.experiment(config(**keys), toy.SHAPE, toy.LEVELS).start
    start = build.experiment(config(**keys, init_adapt=True), toy.SHAPE, toy.LEVELS).start
    assert "pixel/bias" in start.resized and start.unused and not start.anew
    _ = build.experiment(config(init_from=str(exported), data__validation=4), toy.SHAPE, toy.LEVELS).start
    assert "has seen validation images of data.validation=4" in caplog.text


def test_the_mode_exports_the_chosen_checkpoint_and_an_export_is_no_run(source, tmp_path, capsys):
    run_directory, exported, run = source
    program.run(run.config, run_directory, "best", str(tmp_path / "best"))
    size = (tmp_path / "best" / "model.safetensors").stat().st_size / 1000
    size_and_place = f"{size:,.0f} kB in {tmp_path / 'best'}"
    assert capsys.readouterr().out == f"step 3 of {run_directory}: {size_and_place}; see model.json there\n"
    assert workdir.load(tmp_path / "best", "3").state.step == 3
    with pytest.raises(ValueError, match="is an export of step 3 only; there is no checkpoint 6"):
        workdir.load(tmp_path / "best", "6")
    with pytest.raises(ValueError, match=f"{exported} is an export, not a run; .*--config.init_from={exported}"):
        workdir.load(exported, config=run.config)
    with pytest.raises(FileNotFoundError, match=f"no config.json., but an export; --config.init_from={exported} "):
        fork.read(run.experiment, str(exported), tmp_path / "fork")


def test_no_process_goes_on_where_process_0_cannot_export(source, tmp_path, monkeypatch):
    def failed(action):
        raise ValueError("no room")

    monkeypatch.setattr(processes, "on_first", failed)
    monkeypatch.setattr(processes, "is_first", lambda: False)
    monkeypatch.setattr(workdir, "load", lambda *_: source[2])
    with pytest.raises(ValueError, match="no room"):
        program.run(source[2].config, source[0], output=str(tmp_path / "export"))
