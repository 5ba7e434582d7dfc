"""Config keys: completing them, errors and their words, and changes between legs."""

import ast
import dataclasses
import importlib
from pathlib import Path

import pytest

from configs import cifar10
from diffusion.experiment import config as config_lib
from diffusion.experiment import schema
from diffusion.experiment.schema import KEYS
from diffusion.training import loop

ROOT = Path(__file__).parents[2]


def changed(**keys):
    config = cifar10.get_config()
    with config.unlocked():
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in keys.items()})
    return config


CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_complete_and_its_header_says_command_and_cost(name):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    config_lib.check(config)
    assert config.is_locked
    assert set(config_lib.flatten(config)) == set(config_lib.flatten(schema.default_config()))
    for words in (f"--config=configs/{name}.py", "Data  ", "Cost  ", "Expect  "):
        assert words in module.__doc__, words


def test_every_key_is_read_by_the_program():
    """Each `group.key` is spelled out in diffusion/, outside of the table of keys: as an attribute or as a string."""
    attributes, strings = set(), set()
    for path in (ROOT / "diffusion").rglob("*.py"):
        if path.name == "schema.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                owner = node.value
                attributes.add((getattr(owner, "attr", getattr(owner, "id", "")), node.attr))
            if isinstance(node, ast.Constant):
                strings.add(node.value)
    attributes |= {("train", field.name) for field in dataclasses.fields(loop.Plan)}  # which build.plan looks up
    aliases = {"train": ("train", "settings"), "eval": ("eval", "settings"), "sample": ("sample", "config")}
    for key in KEYS:
        group, _, name = key.rpartition(".")
        owners = aliases.get(group, (group or "config",))
        read = key in strings or any((owner, name) in attributes for owner in owners)
        assert read, f"nobody reads {key}"


INTEGER = "must be an integer in 1…2³¹ − 1"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"seed": -1}, "config key seed must be an integer in 0…2³¹ − 1, not -1"),
        ({"seed": True}, "config key seed must be an integer in 0…2³¹ − 1, not True"),
        ({"init_from": 3}, "config key init_from must be a path, or"),
        ({"data__flip": 1}, "config key data.flip must be True or False, not 1"),
        ({"unet__channels": 128.0}, "config key unet.channels must be an integer, not 128.0"),
        ({"unet__channel_mult": (1, 2.0)}, "unet.channel_mult must be a tuple of integers, not (1, 2.0)"),
        ({"unet__dtype": "float16"}, "config key unet.dtype must be one of float32, bfloat16, not 'float16'"),
        ({"optim__learning_rate": 0.0}, "config key optim.learning_rate must be a number in (0, 10], not 0.0"),
        ({"optim__learning_rate": float("nan")}, "config key optim.learning_rate must be a number in (0, 10], not nan"),
        ({"optim__grad_clip": -1.0}, "config key optim.grad_clip must be a number ≥ 0 (0: no clip), not -1.0"),
        ({"ema__decay": 1.0}, "config key ema.decay must be a number in [0, 1), not 1.0"),
        ({"train__num_steps": 0}, f"config key train.num_steps {INTEGER}, not 0"),
        ({"eval__batch_size": 2**31}, f"config key eval.batch_size {INTEGER}, not 2147483648"),
        ({"schedule__num_steps": 10**9}, "schedule.num_steps must be an integer in 1…1,000,000, not 1000000000"),
        ({"schedule__name": "linaer"}, "learned, not 'linaer'; did you mean linear?"),
        ({"schedule__name": "linear(beta=0.1)"}, "but linear has no argument beta, only beta_start, beta_end; did you"),
        ({"schedule__name": "cosine(offset='0')"}, "but the argument offset of cosine must be a number, not '0'"),
        ({"model__network": "unet(out_channels=6)"}, "but unet has no argument out_channels"),
        ({"model__variance": "optimal"}, "model.variance must be one of fixed_small, fixed_large, learned, learned_ra"),
        ({"objective__weighting": "minsnr"}, "one of none, p2, min_snr, sigmoid, not 'minsnr'; did you mean min_snr?"),
        ({"optim__name": "adam(weight_decay=0.1)"}, "but adam has no argument weight_decay, only b1, b2, eps"),
        ({"sample__method": "ddim(eta=1/2)"}, "config key sample.method must be a name, or a name with arguments"),
        ({"eval__protocol": "ho"}, "eval.protocol must be one of exact, ho2020, nichol2021, vdm2021, not 'ho'"),
        ({"eval__variance": "learned"}, "eval.variance must be one of model, fixed_small, fixed_large, optimal, not"),
        ({"quality__features": "inception(path=3)"}, "but the argument path of inception must be a string, not 3"),
        (
            {"quality__reference": "eval"},
            "quality.reference must be train, test, validation or the path of an .npz file",
        ),
        ({"quality__every": -1}, "config key quality.every must be an integer in 0…2³¹ − 1, not -1"),
        ({"eval__terms_per_image": 4}, "eval.terms_per_image must be 0 (all) or an odd number ≥ 3, not 4"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_key_and_what_is_allowed(keys, words):
    config = changed()
    with config.unlocked():
        for key, value in keys.items():  # one by one: ConfigDict's own update would refuse another type
            group, _, name = key.rpartition("__")
            owner = config[group] if group else config
            with owner.ignore_type():
                owner[name] = value
    with pytest.raises(ValueError) as error:
        config_lib.check(config)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_unknown_and_missing_keys_are_named():
    config = changed()
    with config.unlocked():
        config.unet.chanels = 3
    with pytest.raises(ValueError, match=r"config key unet.chanels does not exist; did you mean unet.channels\?"):
        config_lib.check(config)
    config = changed()
    with config.unlocked():
        del config.ema
        config.ema = 0.5
    with pytest.raises(ValueError, match="config key ema does not exist"):
        config_lib.check(config)
    config = changed()
    with config.unlocked():
        del config.ema
    with pytest.raises(ValueError, match="config key ema.decay is missing"):
        config_lib.check(config)


def test_a_network_s_own_keys_may_be_left_out():
    config = changed()
    with config.unlocked():
        del config.unet
    config_lib.check(config)


def test_only_what_shaped_the_run_may_not_differ():
    saved = changed()
    assert config_lib.differing(changed(), saved) == []
    free = {"eval__num_images": 3, "sample__method": "ddim(eta=0.5)", "data__data_dir": "x", "unet__remat": True}
    free |= {"unet__convolution": "xla"}
    free |= {f"train__{name}": 7 for name in (
        "grad_accum", "steps_per_call", "log_every", "checkpoint_every", "keep_checkpoints", "sample_every",
        "check_replicas_every",
    )}  # fmt: skip
    assert config_lib.differing(changed(**free), saved) == []
    now, older = (changed(schedule__name=f"learned(inner='{inner}')") for inner in ("second_moment", "variance"))
    assert config_lib.differing(now, older) == config_lib.differing(older, now) == []
    assert config_lib.differing(changed(train__monitor_images=7), saved) == ["train.monitor_images: 256 → 7"]
    differing = config_lib.differing(changed(seed=1, unet__channel_mult=(1, 2)), saved)
    assert differing == ["seed: 0 → 1", "unet.channel_mult: (1, 2, 2, 2) → (1, 2)"]


def test_an_absent_key_is_at_its_default():
    saved, other, dropped = changed(), changed(), changed(unet__dropout=0.3)
    with other.unlocked():
        del other.unet.dropout, other.seed, other.train.num_steps
    for one, two in ((saved, other), (other, saved)):
        assert config_lib.differing(one, two) == []
    assert config_lib.differing(dropped, other) == ["unet.dropout: 0.1 → 0.3"]
    completed = config_lib.completed(other)
    config_lib.check(completed)
    assert completed.is_locked and completed.seed == 0 and completed.train.num_steps == 800_000
    assert "dropout" not in completed.unet  # the network's own default
    with other.unlocked():
        other.train.num_step = 1
    with pytest.raises(ValueError, match=r"train.num_step does not exist; did you mean train.num_steps\?"):
        config_lib.completed(other)


@pytest.mark.parametrize(
    ("keys", "old", "new", "reason"),
    [
        ({"optim__decay": "constant"}, 6000, 6001, None),
        ({"optim__decay": "constant"}, 6001, 6000, "but a run can only become longer"),
        ({"optim__decay": "cosine"}, 6000, 6001, "on which optim.decay='cosine' depends"),
        ({"optim__decay": "cosine(end=0.5)"}, 6000, 9000, "on which optim.decay='cosine(end=0.5)' depends"),
        ({"optim__decay": "cosine"}, 5000, 6000, None),  # all of it was warm-up
        ({"schedule__name": "learned"}, 6000, 9000, "on which the learning rate of a learned schedule depends"),
    ],
)
def test_a_run_becomes_longer_only_where_its_learning_rates_stay_what_they_were(keys, old, new, reason):
    found = config_lib.differing(changed(**keys, train__num_steps=new), changed(**keys, train__num_steps=old))
    assert found == ([f"train.num_steps: {old} → {new}, {reason}"] if reason else [])


@pytest.mark.parametrize(
    ("old", "new", "problem"), [(1, 9, False), (9, 1, False), (0, 1, True), (1, 0, True), (0, 0, False)]
)
def test_the_budget_of_updates_left_out_may_change_but_not_whether_there_is_one(old, new, problem):
    found = config_lib.differing(changed(train__skip_nonfinite=new), changed(train__skip_nonfinite=old))
    expected = f"train.skip_nonfinite: {old} → {new}, but 0 or more than 0 is settled when a run begins"
    assert found == ([expected] if problem else [])


@pytest.mark.parametrize("key", ["data.data_dir", "init_from"])
def test_none_is_no_folder(key):
    config = changed(**{key.replace(".", "__"): "None"})
    with pytest.raises(ValueError, match=rf"^config key {key} must be a path, or \"\" .*, not 'None'$"):
        config_lib.check(config)
    config_lib.check(changed(**{key.replace(".", "__"): "./None"}))


@pytest.mark.parametrize(
    ("network", "idle"),
    [("unet", []), ("dit", ["unet.channels"]), ("unet(channels=64)", ["unet.channels"]), ("unet(num_heads=2)", [])],
)
def test_fields_of_another_network_are_idle(network, idle):
    config = changed(model__network=network)
    assert config_lib.idle_fields(config, ["seed", "train.num_steps", "unet.channels"]) == idle
