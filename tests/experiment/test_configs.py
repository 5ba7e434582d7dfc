"""The networks of configs/ are those that their headers name, and every config runs."""

import importlib
import json
import re

import jax
import jax.numpy as jnp
import pytest

from configs import imagenet64
from diffusion import data, learned_schedule
from diffusion.data import Description
from diffusion.experiment import build
from diffusion.experiment import config as config_lib
from diffusion.programs import describe
from experiments import ho2020, sweep

# What the sets hold, as their makers say, with the size that the config gives them.
SETS = {
    "cifar10": Description("cifar10", 50_000, 10_000, (32, 32, 3), 256, 10),
    "digits": Description("digits", 1498, 299, (8, 8, 1), 17, 10),
    "digits_adam": Description("digits", 1498, 299, (8, 8, 1), 17, 10),
    "digits_fixed": Description("digits", 1498, 299, (8, 8, 1), 17, 10),
    "imagenet64": Description("downsampled_imagenet/64x64", 1_281_149, 49_999, (64, 64, 3), 256, 0),
    "celebahq256": Description("celeb_a_hq/256", 28_500, 1500, (256, 256, 3), 256, 0),
    "lsun256": Description("lsun/bedroom", 3_033_042, 300, (256, 256, 3), 256, 0),
    "folder64": Description("photos", 4750, 250, (64, 64, 3), 256, 0),
    "folder_small": Description("photos", 285, 15, (32, 32, 3), 256, 0),
    "cifar10_conditional": Description("cifar10", 50_000, 10_000, (32, 32, 3), 256, 10),
    "cifar10_small": Description("cifar10", 50_000, 10_000, (32, 32, 3), 256, 10),
    "digits_conditional": Description("digits", 1498, 299, (8, 8, 1), 17, 10),
    "digits_vdm": Description("digits", 1498, 299, (8, 8, 1), 17, 10),
    "vdm_cifar10": Description("cifar10", 50_000, 10_000, (32, 32, 3), 256, 10),
    "vdm_imagenet32": Description("downsampled_imagenet/32x32", 1_281_149, 49_999, (32, 32, 3), 256, 0),
    "mnist": Description("mnist", 60_000, 10_000, (32, 32, 1), 256, 10),
}


@pytest.mark.parametrize("name", SETS)
def test_the_network_has_the_parameters_that_the_header_names(name):
    module, described = importlib.import_module(f"configs.{name}"), SETS[name]
    config = module.get_config()
    assert config.data.name == described.name
    experiment = build.experiment(config, described.image_shape, described.num_levels, described.num_classes)
    key, image, number = jax.random.key(0), jnp.zeros((1, *described.image_shape)), jnp.zeros(1)
    params = jax.eval_shape(experiment.training.network.init, key, image, number)["params"]
    params |= {"schedule": learned_schedule.init(experiment.start_schedule)} if experiment.learns_schedule else {}
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert re.search(r"Cost +([\d,]+) parameters", module.__doc__).group(1) == f"{count:,}"


@pytest.mark.parametrize("name", SETS)
def test_its_header_says_what_equals_the_paper_and_what_differs_or_that_there_is_none(name):
    header = importlib.import_module(f"configs.{name}").__doc__
    entries = re.findall(r"^([A-Z][a-z]+) {2,}\S", header, re.MULTILINE)
    assert entries[-2:] == ["Equals", "Differs"] or entries[-1] == "Paper" and "Paper    none: " in header


@pytest.mark.parametrize("name", SETS)
def test_what_takes_millions_of_passes_to_score_in_full_is_estimated(name):
    """Of the test split; as many training images are scored beside it."""
    config, images = importlib.import_module(f"configs.{name}").get_config(), SETS[name].num_test
    passes = (config.eval.num_images or images) * config.schedule.num_steps
    assert config.eval.terms_per_image or passes < 1e6


def test_the_two_recipes_of_nichol_and_dhariwal_agree():
    found = config_lib.flatten(imagenet64.get_config())
    wanted = config_lib.flatten(sweep.Cell("cifar10", "configs/cifar10.py", ho2020.IMPROVED).config())
    assert wanted["unet.norm_eps"] == 1e-5 and wanted["model.rescale_t"] and not wanted["data.flip"]
    for key in ho2020.IMPROVED.keys() - {"train.num_steps"}:
        assert found[key] == wanted[key], key


def test_a_run_made_before_a_key_of_its_config_existed_goes_on_with_what_the_program_did_then():
    saved = json.loads(config_lib.to_json(imagenet64.get_config()))
    del saved["model"]["rescale_t"], saved["unet"]["norm_eps"]
    config, saved = imagenet64.get_config(), config_lib.from_json(json.dumps(saved))
    refused = ["model.rescale_t: False → True", "unet.norm_eps: 1e-06 → 1e-05"]
    assert config_lib.differing(config, saved) == refused
    config.model.rescale_t, config.unet.norm_eps = False, 1e-6
    assert config_lib.differing(config, saved) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_its_memory_is_at_most_what_the_header_says(name, monkeypatch, capsys, tmp_path):
    module = importlib.import_module(f"configs.{name}")
    monkeypatch.setattr(data, "describe", lambda *_: SETS[name])
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    describe.run(module.get_config(), tmp_path)
    at_most = float(re.search(r"at most ([\d.]+) GiB", capsys.readouterr().out).group(1))
    said = re.search(r"at most (\d+) GiB", module.__doc__)
    assert at_most < 80 and (said is None or round(at_most) == int(said.group(1)))
