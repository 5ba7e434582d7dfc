"""Runs with labels: the labels that the network gets in scoring and sampling, and errors."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion import data, guidance, likelihood, samplers
from diffusion.data.levels import to_levels, to_unit
from diffusion.evaluation.bound import Bound
from diffusion.experiment import build, workdir
from diffusion.programs import describe, evaluate, sample, train
from diffusion.runtime import randomness


@pytest.fixture
def run(labelled_run, tmp_path):
    return shutil.copytree(labelled_run, tmp_path / "run")


def network_of(directory):
    """(network of (x_t, network_t, labels), the model) of the run's EMA, the network put together by hand."""
    experiment, state, _ = workdir.load(directory)
    module, params = experiment.training.network, state.ema_params

    def network(x_t, network_t, labels):
        return module.apply({"params": params}, x_t, network_t, None, labels)

    return network, experiment.model(params)


def bound_by_hand(directory, denoise):
    """Each scored test image's bound with another denoiser, from the likelihood alone."""
    _, model = network_of(directory)
    test_set = data.load("digits", "test", build_data_dir(directory))
    numbers = evaluate.images.subset(len(test_set), 7)
    key = jax.random.fold_in(randomness.stream(0, "eval"), test_set.split_number)
    x0 = to_unit(jnp.asarray(test_set.images(numbers)), 17)
    keys = randomness.per_item(key, jnp.asarray(numbers))
    measure = likelihood.term_and_x0_mse(model.p, 17)
    terms, _ = likelihood.over_all_t(denoise(test_set.labels(numbers)), model.schedule, x0, keys, measure)
    prior = jax.vmap(lambda image: likelihood.prior_bpd(model.schedule, image))(x0)
    return np.float64(terms).sum(axis=1) + np.float64(prior)


def build_data_dir(directory):
    return workdir.read_config(directory).data.data_dir


def test_the_bits_are_those_given_the_labels_and_the_gain_is_paired(labelled_run):
    summary = json.loads((labelled_run / "summary.json").read_text())
    network, _ = network_of(labelled_run)
    given = bound_by_hand(labelled_run, lambda labels: guidance.conditional(network, labels))
    without = bound_by_hand(labelled_run, lambda labels: guidance.unconditional(network))
    np.testing.assert_allclose(summary["test_bpd"], given.mean(), rtol=1e-5)
    np.testing.assert_allclose(summary["test_unconditional_bpd"], without.mean(), rtol=1e-5)
    gain = without - given
    assert np.abs(gain).max() > 1e-4  # the labels matter to this network
    np.testing.assert_allclose(summary["test_label_gain_bpd"], gain.mean(), atol=2e-6 * given.mean())
    stderr = gain.std(ddof=1) / len(gain) ** 0.5
    np.testing.assert_allclose(summary["test_label_gain_bpd_stderr"], stderr, rtol=1e-2)
    assert summary["protocol"]["labels"] == "given"
    # The label is one of ten: 3.32 bits that whoever decodes the image from this bound must have been told.
    assert summary["label_bpd"] == pytest.approx(3.321928 / 64, rel=1e-6)
    scored = [split for split in ("test", "train", "validation") if f"{split}_bpd" in summary]
    for split in scored:
        assert summary[f"{split}_with_label_bpd"] == summary[f"{split}_bpd"] + summary["label_bpd"]


def test_images_are_drawn_with_every_class_in_turn_and_say_so(labelled_run):
    drawn = np.load(labelled_run / "samples.npz")
    np.testing.assert_array_equal(drawn["labels"], np.arange(15) % 10)
    # Ten rows, one for each class, of at most two images; 48 pixels and a margin of 2 each.
    assert Image.open(labelled_run / "samples.png").size == (2 * 50 + 2, 10 * 50 + 2)


@pytest.mark.parametrize("interval", [(), (2, 5)])
def test_guided_samples_are_those_of_the_guided_network(run, conditional, interval):
    # Strong, because six steps of training have taught the network little about labels.
    chosen = {"sample__labels": (7, 3, 3), "sample__guidance": 80.0, "sample__guidance_interval": interval}
    sample.run(conditional(**chosen), run)
    drawn = np.load(run / "samples.npz")
    np.testing.assert_array_equal(drawn["labels"], np.resize([7, 3, 3], 15))
    network, model = network_of(run)
    denoise = guidance.classifier_free(network, drawn["labels"], 80.0, interval)
    keys = randomness.per_item(randomness.stream(0, "sample"), jnp.arange(15))
    x0, _ = samplers.sample(samplers.ancestral(), denoise, model.p, model.schedule, keys, (8, 8, 1))
    wanted = np.asarray(to_levels(x0, 17))
    # A pixel value may round the other way where the batch is another one.
    assert np.mean(drawn["images"] != wanted) < 0.01
    before = np.load(next((run / sample.SAMPLES).glob("*learned_range-????????????/samples.npz")))
    assert np.mean(before["images"] != drawn["images"]) > 0.05
    (folder,) = (run / sample.SAMPLES).glob("step6-ancestral-6steps-learned_range-guidance80-*")
    about = json.loads((folder / sample.ABOUT).read_text())
    assert (about["labels"], about["guidance_interval"]) == ([7, 3, 3], list(interval) or "every t")


def test_intervals_that_guide_the_same_steps_are_the_same_samples(conditional):
    """And none are those of versions that took (2.5, 4.5) for t = 4 and 5."""

    def interval(*ends):
        config = conditional(sample__guidance=1.0, sample__guidance_interval=ends)
        return sample.described(config, "learned_range")["guidance_interval"]

    assert interval(2.5, 4.5) == interval(2, 4) == interval(2.9, 4.01) == [2, 4]
    assert repr(interval(2.0, 4)) == "[2.0, 4]" and interval() == "every t"
    grid = {"sample__grid": "log_snr(continuous=True)", "sample__guidance": 1.0}
    between = conditional(**grid, sample__guidance_interval=(2.5, 4.5))  # this grid visits t between the integers
    assert sample.described(between, "learned_range")["guidance_interval"] == [2.5, 4.5]


REFUSED = [
    ({"sample__labels": (3, 10)}, "sample.labels=(3, 10): 10 is not one of the labels 0…9"),
    ({"sample__guidance_interval": (5, 2), "sample__guidance": 1.0}, "sample.guidance_interval must be (low, high)"),
    ({"sample__labels": (-1,)}, "sample.labels must be a tuple of integers ≥ 0"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(conditional, changes, message):
    with pytest.raises(ValueError) as error:
        build.experiment(conditional(**changes), (8, 8, 1), 17, 10)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_set_without_labels_is_refused(conditional):
    with pytest.raises(ValueError, match="model.conditional=True needs labels, and data.name='digits' has none"):
        build.experiment(conditional(), (8, 8, 1), 17)


def without_labels(split, share):
    """The splits of the digits, of which one has unknown labels."""
    original = build.load_splits

    def load(config):
        splits = original(config)
        source = getattr(splits, split)
        classes = np.where(np.arange(len(source.classes)) < share * len(source.classes), -1, source.classes)
        return splits._replace(**{split: dataclasses.replace(source, classes=classes)})

    return load


@pytest.mark.parametrize("split, share", [("test", 1.0), ("train", 0.01)])
def test_unknown_labels_are_refused_before_anything_is_compiled_or_written(
    conditional, labelled_run, tmp_path, monkeypatch, caplog, split, share
):
    monkeypatch.setattr(build, "load_splits", without_labels(split, share))
    before = sorted(labelled_run.rglob("*"))
    for run, directory in ((train.run, tmp_path / "new"), (evaluate.run, labelled_run)):
        with pytest.raises(ValueError, match=f"labels of the {split} split are not in 0…9, for example -1"):
            run(conditional(), directory)
    assert not (tmp_path / "new").exists() and sorted(labelled_run.rglob("*")) == before
    assert "train.num_steps=6: the average that is scored and sampled will still weight" in caplog.text  # by hints


def test_the_labels_of_a_test_split_that_is_not_scored_and_of_a_network_without_labels_may_be_unknown(
    conditional, monkeypatch
):
    monkeypatch.setattr(build, "load_splits", without_labels("test", 1.0))
    config = conditional()
    with pytest.raises(ValueError, match="eval.num_images=-1 trains without scoring"):
        evaluate.check_labels(config, build.load_splits(config))
    for changes in ({"eval__num_images": -1}, {"model__conditional": False}):
        config = conditional(**changes)
        evaluate.check_labels(config, build.load_splits(config))


def test_bits_by_class_are_left_out_where_no_label_is_known(conditional, monkeypatch):
    part = np.arange(299.0)
    bounds = {"test": Bound(part, part, part, part)}
    for share, known in ((1.0, False), (0.9, True), (0.0, True)):
        test_set = without_labels("test", share)(conditional()).test
        found = evaluate._by_label(bounds, test_set, np.arange(299), is_given=False)
        assert ("test_bpd_by_class" in found) == known


def test_a_network_that_takes_no_labels_is_refused(conditional):
    with pytest.raises(ValueError, match="model.network='layer' takes no labels"):
        build.experiment(conditional(model__network="layer"), (8, 8, 1), 17, 10)


def test_describe_counts_the_labels_vectors_and_the_same_work(conditional):
    labelled = build.experiment(conditional(), (8, 8, 1), 17, 10)
    without = conditional(model__conditional=False, model__label_dropout=0.0)
    plain = build.experiment(without, (8, 8, 1), 17)
    assert describe.label(labelled)["  a label"].startswith("0.0519 bits/dim") and describe.label(plain) == {}
    numbers = [int(describe.network(e, 1498)["parameters"].replace(",", "")) for e in (labelled, plain)]
    assert numbers[0] - numbers[1] == 10 * 2  # ten classes, each with a vector of the layer's width
    # A product of one-hot labels with the table, and a sum.
    assert 0 <= describe.forward_flops(labelled) - describe.forward_flops(plain) < 5000
