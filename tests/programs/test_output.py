"""--output: another person's run is sampled and scored without writing into it; stopped work continues in DIR."""

import errno
import json
import tempfile

import jax
import numpy as np
import pytest
import toy

from diffusion.evaluation import sampling
from diffusion.experiment import build, results, workdir
from diffusion.programs import evaluate, quality, sample
from diffusion.runtime.preemption import Preempted


@pytest.fixture
def run(toy_run):
    """A run in a directory of its own; afterwards not even a folder's time has changed in it."""
    directory = toy_run.directory / "theirs"
    directory.mkdir()
    for name in ("config.json", "checkpoints"):
        (toy_run.directory / name).rename(directory / name)

    def times():
        return {path: path.stat().st_mtime_ns for path in (directory, *directory.rglob("*"))}

    before = times()
    yield toy_run._replace(directory=directory)
    assert times() == before


class Drawn(sampling.Sampler):
    """A sampler whose images are its calls' numbers."""

    image_shape, guide_sha256, calls = toy.SHAPE, "", 0

    def __init__(self):
        """It needs nothing."""

    def batches(self, model, num_images, is_done):
        self.calls += 1
        yield np.arange(num_images), np.full((num_images, *toy.SHAPE), self.calls, np.uint8)

    def trajectories(self, model, num_images):
        return np.zeros((num_images, 1, *toy.SHAPE), np.uint8)


def test_an_evaluation_beside_the_run_goes_on_where_it_was_stopped(run, tmp_path, monkeypatch):
    out, places = tmp_path / "mine" / "results", []

    def score(experiment, directory, *rest):
        places.append(directory)
        if len(places) == 1:
            raise Preempted("stopped by a signal")
        return {"test_bpd": 1.0}

    monkeypatch.setattr(evaluate, "score", score)
    with pytest.raises(Preempted):
        evaluate.run(run.config(), run.directory, output=str(out))
    evaluate.run(run.config(), run.directory, output=str(out))
    assert places[0] == places[1] and places[0].parent == out / evaluate.EVALUATIONS  # where its terms are kept
    for scored in (out / "eval.json", places[0] / "eval.json"):
        assert json.loads(scored.read_text()) == {"test_bpd": 1.0}
    assert {path.name for path in out.iterdir()} == {"evaluations", "eval.json"}


def test_samples_beside_the_run_keep_their_shards_and_quality_takes_them(run, tmp_path, monkeypatch, capsys):
    out, sampler = tmp_path / "mine", Drawn()
    monkeypatch.setattr(sample, "SHARD_IMAGES", 4)
    monkeypatch.setattr(sample, "make_sampler", lambda experiment: sampler)
    sample.run(run.config(sample__num_images=4), run.directory, output=str(out))
    sample.run(run.config(), run.directory, output=str(out))
    images = np.load(out / "samples.npz")["images"]
    np.testing.assert_array_equal(images[:, 0, 0, 0], [1, 1, 1, 1, 2, 2, 2, 2, 2])
    assert str(out / "samples.png") in capsys.readouterr().out
    quality.run(run.config(quality__num_images=9, quality__features="pixels"), run.directory, output=str(out))
    assert json.loads((out / quality.NAME).read_text())["num_samples"] == 9 and sampler.calls == 2
    assert {path.name for path in out.iterdir()} == {
        "samples", "samples.npz", "samples.png", "progressive.png", "quality.json"
    }  # fmt: skip


def test_published_weights_beside_which_results_lie_become_no_run(layer, tmp_path, monkeypatch):
    experiment = toy.experiment(init_from="published")
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), experiment.abstract_state())
    monkeypatch.setattr(build.Experiment, "initial_state", lambda self: zeros)
    workdir.restore(experiment, tmp_path / "run", claims=False)
    assert not (tmp_path / "run").exists()
    workdir.restore(experiment, tmp_path / "run")
    assert (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("folder", ["", "samples"])
def test_a_run_that_cannot_be_written_to_is_one_line_that_names_output(tmp_path, folder, monkeypatch):
    theirs, make = tmp_path / "theirs", tempfile.TemporaryFile
    (theirs / "samples").mkdir(parents=True)

    def refused(dir):
        if dir == theirs / folder:
            raise OSError(errno.EROFS, "Read-only file system")
        return make(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    line = rf"^{theirs / folder} cannot be written to \(Read-only file system\); --output=DIR writes the results"
    with pytest.raises(OSError, match=line):
        results.place(theirs, "", "samples")
    assert results.place(theirs, str(tmp_path / "mine"), "samples") == tmp_path / "mine"
    assert list((tmp_path / "mine").iterdir()) == []


def test_an_output_that_is_another_run_or_no_place_is_one_line(tmp_path):
    theirs, other, file = tmp_path / "theirs", tmp_path / "other", tmp_path / "file"
    for run in (theirs, other):
        run.mkdir()
        (run / "config.json").touch()
    file.touch()
    assert results.place(theirs, str(theirs), "samples") == theirs
    with pytest.raises(ValueError, match=rf"^--output={other} holds a run or an export of its own; take another"):
        results.place(theirs, str(other), "samples")
    with pytest.raises(ValueError, match=rf"^--output={file} is not a directory$"):
        results.place(theirs, str(file), "samples")
    with pytest.raises(OSError, match=rf"^--output={file}/a cannot be written to \(Not a directory\); take another"):
        results.place(theirs, f"{file}/a", "samples")
    with pytest.raises(ValueError, match="^--output=gs://a is not a local directory; remote paths"):
        results.place(theirs, "gs://a", "samples")
    with pytest.raises(ValueError, match="^--output=None names no directory; ./None is a folder of that name$"):
        results.place(theirs, "None", "samples")
