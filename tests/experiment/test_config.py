"""Configs: real files, no dead keys, and one sentence for every mistake."""

import ast
import itertools
from pathlib import Path

import pytest

from configs import cifar10, digits
from diffusion.experiment import config as config_lib

ROOT = Path(__file__).parents[1]


def changed(**keys):
    config = cifar10.get_config()
    with config.unlocked():
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in keys.items()})
    return config


def test_both_configs_are_complete():
    for get_config in (cifar10.get_config, digits.get_config):
        config = get_config()
        config_lib.check(config)
        assert config.is_locked
        assert set(config_lib.flatten(config)) == set(config_lib.KEYS)


def test_every_key_is_read_by_the_program():
    """Each `group.key` is either spelled out somewhere in diffusion/ or reaches a function as **config.group."""
    read = set()
    for path in (ROOT / "diffusion").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                owner = node.value
                read.add((getattr(owner, "attr", getattr(owner, "id", "")), node.attr))
            if isinstance(node, ast.keyword) and node.arg is None and isinstance(node.value, ast.Attribute):
                read.add((node.value.attr, "**"))
    names = {"train": ("train", "settings"), "sample": ("sample", "config")}
    for key in config_lib.KEYS:
        group, _, name = key.rpartition(".")
        owners = names.get(group, (group or "config",))
        assert any({(owner, name), (owner, "**")} & read for owner in owners), f"nobody reads {key}"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"seed": -1}, "config key seed must be a whole number"),
        ({"seed": True}, "seed must be"),
        ({"unet__channels": -128}, "unet.channels must be a whole number in 1…2³¹ − 1, not -128"),
        ({"unet__channel_mult": ()}, "unet.channel_mult must be a tuple"),
        ({"unet__dropout": 1.0}, r"unet.dropout must be a number in \[0, 0.999\], not 1.0"),
        ({"unet__dtype": "float16"}, "one of float32, bfloat16"),
        ({"optim__learning_rate": 0.0}, "optim.learning_rate"),
        ({"optim__learning_rate": float("nan")}, "optim.learning_rate"),
        ({"ema__decay": 1.0}, "ema.decay"),
        ({"schedule__name": "linaer"}, "schedule.name must be one of linear, cosine"),
        ({"train__num_steps": 0}, "train.num_steps must be a whole number in 1…2³¹ − 1, not 0"),
        ({"eval__batch_size": 2**31}, "eval.batch_size must be a whole number in 1…2³¹ − 1, not 2147483648"),
        ({"schedule__num_steps": 10**9}, "schedule.num_steps must be a whole number in 1…1,000,000, not 1000000000"),
        ({"sample__num_steps": 2000}, "sample.num_steps=2000 exceeds schedule.num_steps=1000"),
        ({"eval__protocol": "ho"}, "eval.protocol must be one of exact, ho2020, not 'ho'"),
        ({"eval__terms_per_image": 4}, "eval.terms_per_image must be 0 .all. or an odd number ≥ 3, not 4"),
        ({"eval__terms_per_image": 1001}, "eval.terms_per_image=1001 must be below schedule.num_steps=1000"),
        ({"model__variance": "learned"}, "objective.name='simple' has no term that trains model.variance='learned'"),
        ({"objective__name": "hybrid"}, "model.variance='fixed_large' is fixed"),
        ({"objective__weighting": "minsnr"}, "objective.weighting must be one of none, p2, min_snr, not 'minsnr'"),
        ({"objective__weighting": "p2", "objective__name": "vlb"}, "objective.name='vlb' does not have"),
        (
            {"objective__weighting": "min_snr", "model__prediction": "mean"},
            "objective.weighting='min_snr' is not defined for model.prediction='mean'",
        ),
        ({"model__variance": "optimal"}, "model.variance must be one of fixed_small, fixed_large, learned"),
        ({"sample__method": "ddim", "sample__variance": "optimal"}, "has no part in sample.method='ddim'"),
        ({"sample__method": "heun", "sample__variance": "fixed_small"}, "has no part in sample.method='heun'"),
        ({"schedule__name": "harmonic"}, "model.prediction must be x0, v or mean"),
    ],
)
def test_a_bad_value_is_one_sentence(keys, words):
    with pytest.raises(ValueError, match=words) as error:
        config_lib.check(changed(**keys))
    assert "\n" not in str(error.value)


def test_unknown_and_missing_keys_are_named():
    config = cifar10.get_config()
    with config.unlocked():
        config.unet.chanels = 3
    with pytest.raises(ValueError, match=r"unet.chanels does not exist; did you mean unet.channels\?"):
        config_lib.check(config)
    config = cifar10.get_config()
    with config.unlocked():
        del config.ema
    with pytest.raises(ValueError, match="config key ema.decay is missing; it must be a number"):
        config_lib.check(config)


def test_only_what_shaped_the_run_may_not_differ():
    saved = config_lib.to_json(changed())
    assert config_lib.differing(changed(), saved) == []
    assert config_lib.differing(changed(eval__num_images=3, sample__eta=0.5, data__data_dir="x"), saved) == []
    differing = config_lib.differing(changed(seed=1, unet__channel_mult=(1, 2)), saved)
    assert differing == ["seed: 0 → 1", "unet.channel_mult: [1, 2, 2, 2] → [1, 2]"]


def test_every_pair_of_prediction_and_variance_has_an_objective():
    for prediction, variance in itertools.product(("eps", "x0", "v", "mean"), ("fixed_small", "learned_range")):
        config_lib.check(changed(model__prediction=prediction, model__variance=variance, objective__name="vlb"))
