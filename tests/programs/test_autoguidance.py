"""sample.guide: samples are guided away from another checkpoint's, their folder names it, and misfits are refused."""

import dataclasses
import errno
import json
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from diffusion import samplers
from diffusion.experiment import build, guide, workdir
from diffusion.programs import quality, sample
from diffusion.runtime import randomness
from diffusion.runtime.checkpoint import Checkpoints


def test_samples_are_drawn_away_from_an_earlier_checkpoint(toy_run):
    config = toy_run.config(sample__guide=f"{toy_run.directory}@3", sample__guidance=0.5)
    sample.run(config, toy_run.directory)
    model, worse = toy_run.model(6), toy_run.model(3)

    def denoise(x_t, network_t):
        output, other = model.denoise(x_t, network_t), worse.denoise(x_t, network_t)
        return jnp.concatenate([1.5 * output[..., :1] - 0.5 * other[..., :1], output[..., 1:]], axis=-1)

    @jax.jit
    def draw(keys):
        return samplers.sample(samplers.ancestral(), denoise, model.p, model.schedule, keys, toy.SHAPE)[0]

    drawn = np.float64(draw(randomness.per_item(randomness.stream(0, "sample"), jnp.arange(9))))
    wanted = np.round((drawn.clip(-1, 1) + 1) * 8)
    found = np.load(toy_run.directory / "samples.npz")["images"]
    # Where batches differ, a pixel value may round the other way.
    assert np.mean(found != wanted) < 0.01 and np.abs(found - wanted).max() <= 1
    (about,) = (json.loads(path.read_text()) for path in toy_run.directory.glob("samples/*/about.json"))
    assert about["guide"] == config.sample.guide and about["guidance"] == 0.5
    assert about["guide_sha256"] not in (None, about["ema_sha256"])


def test_samples_are_filed_under_the_guide_that_drew_them(toy_run, tmp_path_factory):
    """It trains further between the making of the sampler, before a training, and the samples at its end."""
    worse = tmp_path_factory.mktemp("worse") / "run"
    shutil.copytree(toy_run.directory, worse)
    loaded = workdir.load(toy_run.directory, config=toy_run.config(sample__guide=str(worse), sample__guidance=0.5))
    sampler, its = sample.make_sampler(loaded.experiment), workdir.load(worse).state
    with Checkpoints(worse / "checkpoints") as checkpoints:
        state = jax.device_get(loaded.experiment.initial_state())
        checkpoints.save(9, state.replace(step=np.int32(9)), {})
    assert workdir.load(worse).state.sha256 != its.sha256
    folder = sample.save(loaded.experiment, toy_run.directory, loaded.model, loaded.state, sampler=sampler)
    assert json.loads((folder / sample.ABOUT).read_text())["guide_sha256"] == its.sha256


def test_samples_of_a_guide_that_trained_further_are_not_those_asked_for(toy_run, tmp_path_factory, monkeypatch):
    worse = tmp_path_factory.mktemp("worse") / "run"
    shutil.copytree(toy_run.directory, worse)
    config = toy_run.config(sample__guide=str(worse), sample__guidance=0.5)
    its = workdir.load(worse).state
    folder = tmp_path_factory.mktemp("drawn")
    (folder / sample.ABOUT).write_text(json.dumps({"guide_sha256": its.sha256}))
    data = {"train": "aa", "test": "bb"}
    (toy_run.directory / "summary.json").write_text(json.dumps({"ema_sha256": "cc", "data_sha256": data}))
    scores = {"num_samples": config.quality.num_images, "features": config.quality.features}
    scores |= {"reference": "toy, train split, 64 images"}
    scores |= {"sampler": sample.described(config, config.model.variance), "ema_sha256": "cc", "data_sha256": data}

    def is_measured(**guide):
        (toy_run.directory / "quality.json").write_text(json.dumps(scores | guide))
        return quality.is_measured(config, toy_run.directory)

    drawn_with = quality._guide_of(folder)
    assert is_measured(**drawn_with)
    assert not is_measured(guide_sha256="of an earlier checkpoint")
    assert is_measured()  # of an earlier version
    state = jax.device_get(build.experiment(config, toy.SHAPE, toy.LEVELS).initial_state())
    with Checkpoints(worse / "checkpoints") as checkpoints:
        checkpoints.save(9, state.replace(step=np.int32(9)), {})
    assert not is_measured(**drawn_with)
    with monkeypatch.context() as patched:
        patched.setattr(workdir, "load", mock.Mock(side_effect=OSError(errno.EIO, "Input/output error")))
        with pytest.raises(OSError, match="Input/output error"):
            is_measured(**drawn_with)
    shutil.rmtree(worse)
    assert is_measured(**drawn_with)


def test_what_cannot_guide_is_refused_in_one_line(toy_run):
    def refusal(shape=toy.SHAPE, guide_of=toy_run.directory, **keys):
        config = toy_run.config(sample__guide=str(guide_of), sample__guidance=0.5, **keys)
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            guide.load(build.experiment(config, shape, toy.LEVELS))
        assert "\n" not in str(error.value)
        return str(error.value)

    named = f"sample.guide={str(toy_run.directory)!r} "
    assert refusal(shape=(4, 4, 1)) == named + "is of images (8, 8, 1), but this run is of (4, 4, 1)"
    assert refusal(model__prediction="x0") == named + "predicts v, but this run has model.prediction='x0'"
    assert "holds no run" in refusal(guide_of=toy_run.directory / "nowhere")


def test_a_learned_schedule_s_guide_is_given_to_the_sampler_with_its_own(toy_run):
    learned = "learned(start='cosine')"
    config = toy_run.config(sample__guide=str(toy_run.directory), sample__guidance=0.5, schedule__name=learned)
    given = sample.make_sampler(build.experiment(config, toy.SHAPE, toy.LEVELS))._guide_schedule
    np.testing.assert_array_equal(given.log_snr, toy_run.model(6).schedule.log_snr)


def test_the_mean_of_a_step_is_guided_only_by_the_mean_of_the_same_step(toy_run):
    """μ̃_t also depends on the noise at t − 1, so equal log SNR is not enough."""

    def problem(its, own):
        def experiment(keys):
            config = toy_run.config(**{"model__prediction": "mean"} | keys)
            return build.experiment(config, toy.SHAPE, toy.LEVELS)

        loaded = workdir.load(toy_run.directory)._replace(experiment=experiment(its))
        return guide._problem(experiment(own), loaded)

    other = {"schedule__name": "cosine(offset=0.1)"}
    assert problem({}, {}) == problem(other, other) == ""
    assert problem(other | {"model__prediction": "v"}, {"model__prediction": "v"}) == ""
    for its, own in ((other, {}), ({"schedule__num_steps": 7}, {})):
        assert "predicts the means of other steps" in problem(its, own)


def test_an_export_has_no_place_of_a_guide(toy_run, tmp_path_factory):
    """And its config is still one that can be."""
    loaded = workdir.load(toy_run.directory)
    config = toy_run.config(sample__guide="elsewhere", sample__guidance=0.5)
    guided = loaded._replace(experiment=dataclasses.replace(loaded.experiment, config=config))
    exported = tmp_path_factory.mktemp("exports") / "toy"
    guided.export(exported)
    settings = workdir.load(exported).config.sample
    assert (settings.guide, settings.guidance) == ("", 0.0)
