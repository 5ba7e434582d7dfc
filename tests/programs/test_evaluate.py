"""Evaluation: a checkpoint's scores are the run's, every image counts once, and an estimate is of the full bound."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from diffusion import data
from diffusion.evaluation import images
from diffusion.evaluation.bound import Settings, estimated_bound, full_bound
from diffusion.experiment import build
from diffusion.programs import evaluate
from diffusion.training import devices

SEED = 0


@pytest.fixture(scope="module")
def untrained(tiny):
    """The tiny network before training, as a replicated model."""
    experiment = build.experiment(tiny(), (8, 8, 1), 17)
    return devices.replicate(experiment.model(jax.device_get(experiment.initial_state().params)))


@pytest.fixture(scope="module")
def test_set(tiny_data_dir):
    return data.load("digits", "test", tiny_data_dir)


@pytest.fixture(scope="module")
def score():
    """Scores pairs in batches of 16."""
    return full_bound(Settings(SEED, batch_size=16))


def test_the_scores_of_a_checkpoint_are_those_of_the_run(straight, tiny, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / "run")
    scored = (tmp_path / "run" / "bpd.npz").read_bytes()
    assert not (tmp_path / "run" / evaluate.UNFINISHED).exists()
    unfinished = tmp_path / "run" / evaluate.UNFINISHED / "of another evaluation" / "test.npy"
    unfinished.parent.mkdir(parents=True)
    unfinished.touch()
    evaluate.run(tiny(eval__batch_size=7), tmp_path / "run")  # another batch size, the same images and noise
    printed = json.loads(capsys.readouterr().out)
    summary = json.loads((straight / "summary.json").read_text())
    assert printed["ema_sha256"] == summary["ema_sha256"]
    np.testing.assert_allclose(printed["test_bpd"], summary["test_bpd"], rtol=1e-5)
    assert printed == json.loads((tmp_path / "run" / "eval.json").read_text())
    assert (tmp_path / "run" / "bpd.npz").read_bytes() == scored  # what summary.json speaks of
    assert list(unfinished.parent.parent.rglob("*")) == [unfinished.parent, unfinished]


def test_without_a_checkpoint_there_is_nothing_to_score(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        evaluate.run(tiny(), tmp_path)


def test_the_bound_counts_every_image_once(untrained, test_set, score):
    """66 pairs in batches of 16 on 8 devices, the last one padded, equal fewer pairs in other batches."""
    numbers = np.arange(20, 31)
    whole = score(untrained, test_set, numbers)
    assert whole.terms_bpd.shape == (11, 6)
    in_eights = full_bound(Settings(SEED, batch_size=8))
    again = in_eights(untrained, test_set, numbers[3:])  # fewer images: each keeps its own noise
    np.testing.assert_allclose(again.image_bpd, whole.image_bpd[3:], rtol=1e-5)
    other_split = dataclasses.replace(test_set, split="train")
    assert not np.allclose(in_eights(untrained, other_split, numbers[3:]).image_bpd, again.image_bpd)
    np.testing.assert_allclose(whole.summary("test")["test_bpd"], whole.image_bpd.mean())
    parts = whole.terms_bpd[:, 0], whole.terms_bpd[:, 1:].sum(axis=1), whole.prior_bpd
    np.testing.assert_allclose(whole.image_bpd, sum(parts))


def test_a_bound_that_was_cut_computes_what_is_missing(untrained, test_set, score, tmp_path):
    """Finished terms are read from the file and not computed again; the others come out as without a file."""
    numbers, kept = np.arange(5), tmp_path / "kept" / "test.npy"
    whole = score(untrained, test_set, numbers)
    np.testing.assert_array_equal(score(untrained, test_set, numbers, kept).terms_bpd, whole.terms_bpd)
    terms = np.load(kept, mmap_mode="r+")
    terms[0, :3], terms[0, 3:] = 7.0, np.nan
    terms.flush()
    again = score(untrained, test_set, numbers, kept).terms_bpd
    np.testing.assert_array_equal(again[:3], 7.0)
    np.testing.assert_allclose(again[3:], whole.terms_bpd[3:], rtol=1e-5)


def test_the_estimate_is_of_the_full_evaluation(untrained, test_set):
    """From the same terms: the decoder's are equal, the sum of the others has the error that is stated."""
    numbers = np.arange(60)
    estimate = estimated_bound(Settings(SEED, batch_size=64, terms_per_image=3))(untrained, test_set, numbers)
    full = full_bound(Settings(SEED, batch_size=64))(untrained, test_set, numbers)
    np.testing.assert_allclose(estimate.decoder_bpd, full.decoder_bpd, rtol=1e-5)
    np.testing.assert_allclose(estimate.decoded_mse, full.decoded_mse, rtol=1e-5)
    np.testing.assert_allclose(estimate.prior_bpd, full.prior_bpd, rtol=1e-5)
    assert 0 < estimate.sampling_stderr < 0.2 * full.kl_bpd.mean() and full.sampling_stderr == 0
    assert abs(estimate.image_bpd.mean() - full.image_bpd.mean()) < 3 * estimate.sampling_stderr


def test_ho_et_al_drop_the_remainder_of_256():
    for wanted, num_test, scored in ((0, 10_000, 9_984), (1000, 10_000, 768), (256, 299, 256)):
        assert images.num_scored(wanted, "ho2020", num_test) == scored
    assert images.num_scored(0, "exact", 299) == 299
    with pytest.raises(ValueError, match=r"eval.protocol='ho2020' scores multiples of 256 images, not 20 \("):
        images.num_scored(20, "ho2020", 299)
    with pytest.raises(ValueError, match="eval.num_images=300 exceeds the 299"):
        images.num_scored(300, "exact", 299)


def test_a_subset_is_drawn_from_the_whole_set():
    chosen = images.subset(1000, 100)
    assert len(np.unique(chosen)) == 100 and np.all(np.diff(chosen) > 0)
    assert np.bincount(chosen // 100, minlength=10).min() > 0  # every tenth of a set that is sorted by class
    np.testing.assert_array_equal(images.subset(1000, 1000), np.arange(1000))
