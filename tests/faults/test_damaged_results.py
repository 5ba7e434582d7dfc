"""Results that are truncated, empty or damaged: they are made again if possible, else one line names them."""

import json
import shutil

import numpy as np
import pytest

from diffusion import data, reverse, schedules
from diffusion.evaluation import kept
from diffusion.evaluation.features import Batch, Features
from diffusion.evaluation.sampling import Sampler
from diffusion.experiment import ema, workdir
from diffusion.experiment.schema import default_config
from diffusion.model import Model
from diffusion.programs import fork, quality, sample
from diffusion.reporting.metrics_log import read_metrics
from diffusion.runtime import files
from diffusion.variances import X0Variance
from experiments import results

DAMAGE = {
    "empty": lambda content: b"",
    "cut in its head": lambda content: content[:9],
    "cut": lambda content: content[: len(content) * 2 // 3],
    "other bytes": lambda content: bytes(len(content)),
    "no text": lambda content: b"\xff\xfe\x00" + content,
}


@pytest.fixture(params=DAMAGE)
def damage(request):
    def of(path):
        path.write_bytes(DAMAGE[request.param](path.read_bytes()))

    return of


class Drawer(Sampler):
    """A sampler that needs no network: image n shows the number n."""

    def __init__(self):
        self.image_shape, self.drawn = (2, 2, 1), []

    def batches(self, model, num_images, is_done=None):
        numbers = np.flatnonzero(~is_done)
        self.drawn.append(numbers.tolist())
        yield numbers, np.tile(numbers.astype(np.uint8)[:, None, None, None], (1, 2, 2, 1))


MODEL = Model(lambda x_t, network_t: x_t, reverse.make("eps", "fixed_small"), schedules.cosine(2))


def test_a_shard_of_samples_is_drawn_again(tmp_path, damage, monkeypatch):
    monkeypatch.setattr(sample, "SHARD_IMAGES", 4)
    drawer = Drawer()
    sample._fill(drawer, MODEL, tmp_path, 9, None)
    before = sample.read(tmp_path, 9)
    damage(sample.shard(tmp_path, 1))
    sample._fill(drawer, MODEL, tmp_path, 9, None)
    assert drawer.drawn == [list(range(9)), list(range(4, 8))]
    np.testing.assert_array_equal(sample.read(tmp_path, 9), before)


@pytest.mark.parametrize("foreign", [np.zeros((4, 2, 2, 3), np.uint8), np.zeros((4, 2, 2, 1), np.float32), np.uint8(3)])
def test_a_shard_that_holds_something_else_is_drawn_again(tmp_path, foreign):
    np.save(sample.shard(tmp_path, 0), foreign)
    drawer = Drawer()
    sample._fill(drawer, MODEL, tmp_path, 4, None)
    assert drawer.drawn == [[0, 1, 2, 3]] and sample.read(tmp_path, 4).max() == 3


@pytest.mark.parametrize("wrong", [b"(", b"'", b"\n"])
def test_a_header_that_is_no_python_is_damage(tmp_path, wrong):
    path = tmp_path / "test.npy"
    kept.on_disk(path, (2, 3))[:] = 1.0
    path.write_bytes(path.read_bytes().replace(b"}", wrong, 1))
    assert np.isnan(kept.on_disk(path, (2, 3))).all()


def test_terms_of_an_unfinished_evaluation_are_computed_again(tmp_path, damage):
    path, shape = tmp_path / "unfinished" / "test.npy", (2, 3, 4)
    terms = kept.on_disk(path, shape)
    terms[:] = 1.0
    terms.flush()
    assert (kept.on_disk(path, shape) == 1.0).all()
    damage(path)
    assert np.isnan(kept.on_disk(path, shape)).all()


def test_features_of_a_call_that_was_stopped_are_computed_again(tmp_path, damage):
    images, calls = np.zeros((3, 2, 2, 1), np.uint8), []

    def extract(images):
        calls.append(len(images))
        return Batch(np.ones((len(images), 5)), np.zeros((len(images), 2)))

    features = Features(extract, sha256="ab")
    list(features.batches(images, tmp_path))
    damage(next(tmp_path.iterdir()))
    (batch,) = features.batches(images, tmp_path)
    assert calls == [3, 3] and batch.features.sum() == 15
    list(features.batches(images, tmp_path))
    assert calls == [3, 3]


def test_a_run_whose_summary_is_damaged_is_scored_again(tmp_path, damage):
    summary, config = tmp_path / workdir.SUMMARY, default_config()
    workdir.claim(config, tmp_path)
    content = {"ema_sha256": "ab", "test_bpd": 3.0}
    for path in (summary, tmp_path / quality.NAME):
        path.write_text(json.dumps(content))
    assert workdir.is_finished(tmp_path) and quality.read(tmp_path) == content
    damage(summary)
    assert not workdir.is_finished(tmp_path) and not workdir.is_finished(tmp_path, config)
    assert quality.read(tmp_path) == {}
    with config.unlocked():
        config.train.num_steps += 1
    workdir.claim(config, tmp_path)  # what is damaged is not kept as the summary of an earlier leg
    assert [path.name for path in tmp_path.glob("summary*")] == [workdir.SUMMARY]


def test_a_sweep_names_a_damaged_run_and_reports_the_others(tmp_path, damage):
    runs = [tmp_path / name for name in ("a", "b")]
    for run in runs:
        workdir.claim(default_config(), run)
        (run / workdir.SUMMARY).write_text(json.dumps({"test_bpd": 3.0, "ema_sha256": "ab"}))
        np.savez(run / "bpd.npz", test_image_bpd=np.ones(2), test_terms_bpd=np.ones(3))
    assert [run.name for run in results.read(tmp_path)[0]] == ["a", "b"]
    damage(runs[0] / workdir.SUMMARY)
    finished, unfinished = results.read(tmp_path)
    assert [run.name for run in finished] == ["b"]
    assert unfinished == {"a": "summary.json is damaged; the same command scores the run again"}
    damage(runs[1] / "bpd.npz")
    with pytest.raises(ValueError, match="b/bpd.npz is damaged .*; delete .*b/summary.json, and the same"):
        results.read(tmp_path)


def test_what_cannot_be_made_again_is_named(tmp_path, damage):
    state = ema.EmaState(np.int32(7), {"w": np.ones(3, np.float32)})
    estimate = X0Variance(np.ones(5, np.float32), np.ones(5, np.float32))
    ema.save_x0_variance(tmp_path, estimate, estimate, state)
    damage(tmp_path / ema.X0_VARIANCE)
    with pytest.raises(ValueError, match="x0_variance.npz is damaged; python -m experiments.variance"):
        ema.load_x0_variance(tmp_path, state)
    files.write_text(tmp_path / fork.NAME, json.dumps({"directory": "/runs/old", "step": 7}))
    damage(tmp_path / fork.NAME)
    with pytest.raises(ValueError, match="fork.json is damaged, which says where this run comes from; restore it"):
        fork.check_made(tmp_path)
    files.write_text(tmp_path / "metrics.jsonl", 3 * '{"step": 1, "loss": 0.5}\n')
    damage(tmp_path / "metrics.jsonl")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write("\n{}\n")
    try:
        read_metrics(tmp_path)
    except ValueError as error:
        assert "metrics.jsonl is damaged" in str(error)


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json", "metadata.json"])
def test_a_data_set_whose_description_is_damaged_is_named(tiny_data_dir, tmp_path, damage, name):
    copy = shutil.copytree(f"{tiny_data_dir}/digits/1.0.0", tmp_path / "digits" / "1.0.0")
    damage(copy / name)
    for use in (data.describe, lambda name, directory: data.load(name, "test", directory)):
        with pytest.raises(ValueError, match="a .json file in .*digits/1.0.0 is damaged .*: copy or prepare"):
            use("digits", str(tmp_path))
