"""A run with a learned schedule: training, saving, scoring and sampling."""

import dataclasses
import json

import numpy as np
import pytest

from diffusion import data, learned_schedule
from diffusion.evaluation import images
from diffusion.evaluation.bound import full_bound
from diffusion.experiment import build, workdir
from diffusion.programs import evaluate, sample, train
from diffusion.runtime import devices
from diffusion.runtime.checkpoint import Checkpoints

pytestmark = pytest.mark.usefixtures("programs_compiled_once")

BY_SECOND_MOMENT = "learned(start='cosine', inner='second_moment')"


@pytest.fixture(scope="module")
def learning(tiny):
    """A function of changes: a config of a network that compiles soon, whose schedule is learned."""

    def config_with(**changes):
        small = {
            "schedule__name": "learned(start='cosine')", "unet__channel_mult": (1,), "unet__attention_resolutions": (),
            "train__num_steps": 4, "train__checkpoint_every": 4, "train__sample_every": 0, "eval__num_images": 16,
            "sample__num_images": 8, "optim__warmup_steps": 1,
        }  # fmt: skip
        return tiny(**small | changes)

    return config_with


@pytest.fixture(scope="module")
def run(learning, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "run"
    train.run(learning(schedule__name=BY_SECOND_MOMENT), directory)
    return directory


def test_a_run_trains_its_schedule_and_the_checkpoint_holds_it(run):
    assert (run / "schedule.png").exists()
    loaded = workdir.load(run)
    assert loaded.experiment.learns_schedule
    start = learned_schedule.init(loaded.experiment.start_schedule)
    with Checkpoints(run / "checkpoints") as checkpoints:
        state = checkpoints.resume(loaded.experiment.abstract_state())
    for params in (state.params, state.ema_params):
        for name, before in start.items():
            assert np.all(params[learned_schedule.SUBTREE][name] != before), name
    log_snr = np.asarray(loaded.experiment.model(state.params).schedule.log_snr)[1:]
    assert (np.diff(log_snr) < 0).all()
    assert not np.allclose(log_snr, loaded.experiment.start_schedule.log_snr[1:], atol=1e-3)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(rows[-1]["loss"], rows[-1]["vlb_bpd"] + rows[-1]["prior_bpd"], rtol=1e-5)


def test_scores_and_samples_are_those_of_the_checkpoint_s_schedule(run, learning, capsys):
    summary = json.loads((run / "summary.json").read_text())
    few = learning(schedule__name=BY_SECOND_MOMENT, sample__num_steps=3, sample__num_images=2)
    evaluate.run(few, run)
    np.testing.assert_allclose(json.loads(capsys.readouterr().out)["test_bpd"], summary["test_bpd"], rtol=1e-6)
    sample.run(few, run)
    assert np.load(run / "samples.npz")["images"].shape == (2, 8, 8, 1)

    loaded, test_set = workdir.load(run), data.load("digits", "test", few.data.data_dir)
    model, numbers = loaded.model, images.subset(len(test_set), 16)
    before_training = dataclasses.replace(model, schedule=loaded.experiment.start_schedule)
    score = full_bound(build.bound_settings(few))
    for scored, is_same in ((model, True), (before_training, False)):
        bpd = score(devices.replicate(scored), test_set, numbers).image_bpd.mean()
        assert np.isclose(bpd, summary["test_bpd"], rtol=1e-6) == is_same
    prior = score(devices.replicate(model), test_set, numbers).prior_bpd.mean()
    last = np.asarray(model.schedule.alpha_bar, np.float64)[-1]
    x0 = test_set.images(numbers) / 8 - 1.0
    kl_nats = 0.5 * (last * (x0**2).mean() - last - np.log1p(-last))
    np.testing.assert_allclose(prior, kl_nats / np.log(2), rtol=0.1)  # of size 1e-6: a difference in float32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective__name": "simple", "model__variance": "fixed_small"}, "objective.name='simple' is not a bound"),
        ({"objective__name": "hybrid"}, "schedule.name=\"learned.start='cosine'.\" needs objective.name='vlb'"),
        (
            {"schedule__name": BY_SECOND_MOMENT, "objective__timesteps": "loss_aware"},
            "minimises the second moment over uniform t",
        ),
        ({"schedule__name": "learned(inner='endpoints')"}, "inner of learned must be one of bound, second_moment"),
        ({"schedule__name": "learned(start='learned')"}, "start must be one of linear, cosine"),
        ({"schedule__name": "learned(start='harmonic')", "model__prediction": "v"}, "cannot start where log SNR_T"),
        ({"schedule__name": "learned(learning_rate=0.0)"}, "learning_rate=0.0 of learned must be in"),
    ],
)
def test_what_cannot_train_a_schedule_is_refused(changes, words, learning):
    with pytest.raises(ValueError, match=words):
        build.experiment(learning(**changes), (8, 8, 1), 17)


def test_only_a_learned_schedule_changes_the_parameters(learning):
    fixed = build.experiment(learning(schedule__name="cosine"), (8, 8, 1), 17)
    learned = build.experiment(learning(), (8, 8, 1), 17)
    without, with_schedule = fixed.abstract_state().params, learned.abstract_state().params
    assert with_schedule.keys() - without.keys() == {learned_schedule.SUBTREE}
    assert not fixed.learns_schedule and fixed.model(without).schedule is fixed.start_schedule
