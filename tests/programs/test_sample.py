"""Sampling from a checkpoint: in shards that an interrupted call keeps, named by their settings."""

import json
import shutil
from fnmatch import fnmatch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from PIL import Image

from diffusion import samplers, schedules
from diffusion.evaluation import sampling
from diffusion.experiment import workdir
from diffusion.programs import evaluate, quality, sample, train
from diffusion.runtime import devices, files, preemption, randomness
from diffusion.runtime.preemption import Preempted

pytestmark = pytest.mark.usefixtures("programs_compiled_once")


@pytest.fixture
def run(straight, tmp_path):
    """A copy of the finished run to sample from."""
    return shutil.copytree(straight, tmp_path / "run")


def saved_images(directory):
    return np.load(directory / "samples.npz")["images"]


def test_the_samples_of_a_checkpoint_are_those_of_the_run(run, straight, tiny):
    shutil.rmtree(run / sample.SAMPLES)
    sample.run(tiny(sample__batch_size=5), run)
    again, before = saved_images(run), saved_images(straight)
    # A pixel value may round the other way where the batch size changed the order of sums.
    assert np.mean(again != before) < 0.01 and np.abs(again.astype(int) - before).max() <= 1


def test_another_method_with_fewer_steps_and_images_keeps_the_others(run, tiny):
    few_config = tiny(sample__method="ddim(eta=0.5)", sample__num_steps=3, sample__num_images=2)
    sample.run(few_config, run)
    few = saved_images(run)
    assert few.shape == (2, 8, 8, 1) and few.dtype == np.uint8 and few.max() <= 16
    # A row of pictures for each image, a column for each of the three steps; 48 pixels and a margin of 2 each.
    assert Image.open(run / "progressive.png").size == (3 * 50 + 2, 2 * 50 + 2)
    folders = {path.name.rpartition("-")[0]: path for path in (run / sample.SAMPLES).iterdir()}
    assert folders.keys() == {"step6-ancestral-6steps-learned_range", "step6-ddim_eta=0.5_-3steps-learned_range"}
    assert len(saved_images(folders["step6-ancestral-6steps-learned_range"])) == 9


def test_an_interrupted_call_keeps_its_shards_and_more_images_are_drawn_beside_them(run, tiny, monkeypatch):
    monkeypatch.setattr(sample, "SHARD_IMAGES", 4)
    shutil.rmtree(run / sample.SAMPLES)

    def stop(self):
        raise Preempted("stopped by a signal")

    with monkeypatch.context() as patch:
        patch.setattr(preemption.Preemption, "check", stop)
        with pytest.raises(Preempted):
            sample.run(tiny(), run)
    (folder,) = (run / sample.SAMPLES).iterdir()
    first = sample.shard(folder, 0)
    marked = np.full_like(np.load(first), 3)
    np.save(first, marked)
    sample.run(tiny(), run)  # 9 images: 4, 4 and 1
    np.testing.assert_array_equal(saved_images(run)[:4], marked)  # not drawn again
    assert [len(np.load(path)) for path in sorted(folder.glob("shard_*.npy"))] == [4, 4, 1]
    sample.run(tiny(sample__num_images=11), run)
    assert [len(np.load(path)) for path in sorted(folder.glob("shard_*.npy"))] == [4, 4, 3]
    assert len(saved_images(run)) == 11


def test_what_is_drawn_is_kept_after_any_batch_and_the_model_is_sent_once(toy_run, monkeypatch):
    """A batch may be larger than a shard; 24 images are two batches, of 16 and of 8."""
    monkeypatch.setattr(sample, "SHARD_IMAGES", 4)
    experiment, state, _ = workdir.load(toy_run.directory)
    with experiment.config.unlocked():
        experiment.config.sample.batch_size = 16
    model, sampler = experiment.model(state.ema_params), sample.make_sampler(experiment)
    monkeypatch.setattr(sample, "make_sampler", lambda _: sampler)  # compiled once
    sent, replicate = [], devices.replicate
    monkeypatch.setattr(sampling.devices, "replicate", lambda tree: sent.append(tree) or replicate(tree))
    straight = sample.fill(experiment, toy_run.directory, model, state, 24)
    images = sample.read(straight, 24)
    shutil.rmtree(straight)

    def stop():
        raise Preempted("stopped by a signal")

    for held in (16, 24):
        with pytest.raises(Preempted):
            sample.fill(experiment, toy_run.directory, model, state, 24, stop)
        assert sum(len(np.load(path)) for path in straight.glob("shard_*.npy")) == held
    np.testing.assert_array_equal(sample.read(straight, 24), images)
    assert sample.fill(experiment, toy_run.directory, model, state, 24, stop) == straight and len(sent) == 3


def test_a_shard_is_written_from_time_to_time_and_goes_on_where_it_ends(monkeypatch, tmp_path):
    monkeypatch.setattr(sample, "SHARD_IMAGES", 5)
    images = np.random.default_rng(0).integers(0, 256, (12, *toy.SHAPE), np.uint8)
    drawn = sample._Drawn(tmp_path)
    drawn.add(np.arange(3), images[:3])
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sample, "SAVE_SECONDS", -1.0)
    drawn.add(np.arange(3, 7), images[3:7])
    assert [len(np.load(path)) for path in sorted(tmp_path.iterdir())] == [5, 2]
    again = sample._Drawn(tmp_path)
    again.add(np.arange(7, 12), images[7:])
    again.write()
    np.testing.assert_array_equal(sample.read(tmp_path, 12), images)


def test_samples_of_other_weights_of_the_same_step_are_not_taken(toy_run):
    """A run begun again in the same directory, or a checkpoint that was exchanged, has the old one's step."""
    old = toy_run.directory / sample.SAMPLES / "step6-ancestral-3steps-learned_range"  # as earlier versions named it
    old.mkdir(parents=True)
    np.save(sample.shard(old, 0), np.zeros((9, *toy.SHAPE), np.uint8))
    experiment, state, _ = loaded = workdir.load(toy_run.directory)
    model = loaded.model
    first = sample.fill(experiment, toy_run.directory, model, state, 9)
    assert first == sample.fill(experiment, toy_run.directory, model, state, 9) != old
    changed = state.replace(ema_params=jax.tree.map(lambda leaf: leaf + np.float32(0.5), state.ema_params))
    second = sample.fill(experiment, toy_run.directory, experiment.model(changed.ema_params), changed, 9)
    assert first != second and first.name.rpartition("-")[0] == second.name.rpartition("-")[0] == old.name
    assert np.any(sample.read(first, 9) != sample.read(second, 9)) and sample.read(first, 9).any()
    about = json.loads((second / sample.ABOUT).read_text())
    assert about["ema_sha256"] == changed.sha256 and about["step"] == 6 and about["seed"] == 0


def test_the_name_of_a_folder_is_short_and_another_one_for_every_difference():
    about = {"step": 6, "method": "ddim", "num_steps": 9, "variance": "model", "ema_sha256": "ab"}
    others = [about | {"labels": list(range(110))}, about | {"ema_sha256": "ac"}, about | {"method": "ddim(" * 99}]
    others += [about | {"labels": [1, 23]}, about | {"labels": [12, 3]}, about | {"guidance": 1.5}]
    names = {sample.name(one) for one in (about, *others)}
    assert len(names) == 7 and max(map(len, names)) <= sample.MAX_NAME + 13


def test_the_grid_shows_the_previews_and_many_images_stay_in_their_shards(run, tiny, monkeypatch):
    monkeypatch.setattr(sample, "MAX_ARCHIVE_BYTES", 9 * 64 - 1)
    sample.run(tiny(sample__num_previews=4), run)
    assert Image.open(run / "samples.png").size == (2 * 50 + 2, 2 * 50 + 2)
    assert not (run / "samples.npz").exists()
    assert sum(len(np.load(path)) for path in (run / sample.SAMPLES).glob("*/shard_*.npy")) == 9


def test_whatever_is_written_is_known_to_the_check_for_foreign_files(run, tiny):
    """Or a run could begin in a folder where it would overwrite what it does not list."""
    evaluate.run(tiny(eval__num_images=2), run)
    quality.run(tiny(quality__num_images=4), run)
    known = (*workdir.WRITTEN, files.LOCK, "config.json")
    unknown = [path.name for path in run.iterdir() if not any(fnmatch(path.name, pattern) for pattern in known)]
    assert not unknown


def test_without_a_checkpoint_there_is_nothing_to_sample_from(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        sample.run(tiny(), tmp_path)


# --- which images these are, by hand


ANCESTRAL = samplers.ancestral()


def samples_by_hand(model, num_images, num_steps=3, step=ANCESTRAL, clip_x0=True):
    keys = randomness.per_item(randomness.stream(0, "sample"), jnp.arange(num_images))
    schedule = schedules.evenly_spaced(model.schedule, num_steps)
    x, _ = samplers.sample(step, model.denoise, model.p, schedule, keys, toy.SHAPE, clip_x0)
    return np.round((np.asarray(x, np.float64).clip(-1, 1) + 1) * 8)


def assert_images_are(found, wanted):
    # Where batches differ, a pixel value may round the other way.
    assert np.mean(found != wanted) < 0.01 and np.abs(found - wanted).max() <= 1


@pytest.mark.parametrize(("checkpoint", "step"), [("latest", 6), ("best", 3)])
def test_samples_are_drawn_from_the_ema_of_the_chosen_checkpoint_with_clipped_x0(toy_run, checkpoint, step):
    sample.run(toy_run.config(), toy_run.directory, checkpoint)
    found, model = saved_images(toy_run.directory), toy_run.model(step)
    assert_images_are(found, samples_by_hand(model, 9))
    assert np.mean(found != samples_by_hand(model, 9, clip_x0=False)) > 0.05


def test_a_run_s_own_samples_are_drawn_from_its_last_ema(toy_run):
    train.run(toy_run.config(eval__num_images=1), toy_run.directory)
    assert_images_are(saved_images(toy_run.directory), samples_by_hand(toy_run.model(6), 9))


def test_fewer_steps_are_those_of_the_respaced_schedule(toy_run):
    sample.run(toy_run.config(sample__num_steps=2, sample__method="ddim"), toy_run.directory)
    found, model = saved_images(toy_run.directory), toy_run.model(6)
    assert_images_are(found, samples_by_hand(model, 9, num_steps=2, step=samplers.ddim()))
    assert np.mean(found != samples_by_hand(model, 9, step=samplers.ddim())) > 0.05


def test_sampling_locks_the_folder_of_its_results(toy_run, monkeypatch):
    class Locked(Exception):
        pass

    def fill(sampler, model, folder, num_images, stop):
        with pytest.raises(ValueError, match="is in use by process"), workdir.locked(folder):
            pass
        raise Locked

    monkeypatch.setattr(sample, "_fill", fill)
    with pytest.raises(Locked):
        sample.run(toy_run.config(), toy_run.directory)
