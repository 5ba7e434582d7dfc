"""A run with a learned schedule: what it trains, saves, scores and samples with."""

import json

import jax
import numpy as np
import pytest

from configs import digits
from diffusion import data, learned_schedule
from diffusion.evaluation import bound
from diffusion.experiment import build, config, workdir
from diffusion.programs import evaluate, sample, train
from diffusion.training import devices


def tiny(**keys):
    small = {
        "schedule.name": "learned", "schedule.start": "cosine", "schedule.num_steps": 6, "unet.channels": 8,
        "unet.channel_mult": (1,), "unet.num_groups": 4, "unet.attention_resolutions": (), "unet.fourier_features": (),
        "train.batch_size": 16, "train.num_steps": 4, "train.log_every": 2, "train.checkpoint_every": 4,
        "train.sample_every": 0, "eval.num_images": 16, "eval.batch_size": 16, "sample.num_images": 8,
        "optim.warmup_steps": 1,
    }  # fmt: skip
    tiny_config = digits.get_config()
    with tiny_config.unlocked():
        tiny_config.update_from_flattened_dict(small | {key.replace("__", "."): value for key, value in keys.items()})
    return tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("data")))
    directory = tmp_path_factory.mktemp("runs") / "run"
    train.run(tiny(schedule__inner="variance"), directory)
    yield directory
    patch.undo()


def test_a_run_trains_its_schedule_and_the_checkpoint_holds_it(run):
    assert (run / "schedule.png").exists()
    experiment = build.experiment(tiny(schedule__inner="variance"), (8, 8, 1), 17)
    state = workdir.restore(experiment, run)
    for params in (state.params, state.ema_params):
        for name, start in experiment.schedule_params["schedule"].items():
            assert np.all(params["schedule"][name] != start), name
    log_snr = np.asarray(experiment.schedule_of(state.params).log_snr)[1:]
    assert (np.diff(log_snr) < 0).all()
    assert not np.allclose(log_snr, experiment.initial_schedule.log_snr[1:], atol=1e-3)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(rows[-1]["loss"], rows[-1]["vlb_bpd"] + rows[-1]["prior_bpd"], rtol=1e-5)
    with pytest.raises(ValueError, match="use schedule_of"):
        experiment.schedule  # noqa: B018


def test_scores_and_samples_are_those_of_the_checkpoint_s_schedule(run, capsys):
    summary = json.loads((run / "summary.json").read_text())
    few = tiny(schedule__inner="variance", sample__num_steps=3, sample__num_images=2)
    evaluate.run(few, run)
    np.testing.assert_allclose(json.loads(capsys.readouterr().out)["test_bpd"], summary["test_bpd"], rtol=1e-6)
    sample.run(few, run)
    assert np.load(run / "samples.npz")["images"].shape == (2, 8, 8, 1)

    experiment = build.experiment(few, (8, 8, 1), 17)
    ema, test_set = workdir.restore(experiment, run).ema_params, data.load("digits", "test")
    score, numbers = bound.bound_of(experiment), evaluate.subset(len(test_set.images), 16)
    for params, is_same in ((ema, True), (ema | experiment.schedule_params, False)):
        bpd = score(devices.replicate(jax.device_get(params)), test_set, numbers).image_bpd.mean()
        assert np.isclose(bpd, summary["test_bpd"], rtol=1e-6) == is_same
    fixed = experiment.with_fixed_schedule(ema)
    np.testing.assert_array_equal(fixed.schedule.log_snr, experiment.schedule_of(ema).log_snr)
    again = bound.bound_of(fixed)(devices.replicate(jax.device_get(ema)), test_set, numbers)
    np.testing.assert_allclose(again.image_bpd.mean(), summary["test_bpd"], rtol=1e-6)
    prior = score(devices.replicate(ema), test_set, numbers).prior_bpd.mean()
    last = np.asarray(experiment.schedule_of(ema).alpha_bar, np.float64)[-1]
    x0 = test_set.images[numbers] / 8 - 1.0
    kl_nats = 0.5 * (last * (x0**2).mean() - last - np.log1p(-last))
    np.testing.assert_allclose(prior, kl_nats / np.log(2), rtol=0.1)  # of size 1e-6: a difference in float32


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"objective__name": "simple", "model__variance": "fixed_small"}, "objective.name='simple' is no bound"),
        ({"objective__name": "hybrid"}, "schedule.name='learned' needs objective.name='vlb'"),
        (
            {"schedule__inner": "variance", "objective__timesteps": "loss_aware"},
            "minimises the variance over uniform t",
        ),
        ({"schedule__inner": "endpoints"}, "schedule.inner must be one of bound, variance"),
        ({"schedule__start": "learned"}, "schedule.start must be one of linear, cosine"),
        ({"schedule__learning_rate": 0.0}, "schedule.learning_rate must be"),
    ],
)
def test_what_cannot_train_a_schedule_is_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        config.check(tiny(**keys))


def test_only_a_learned_schedule_changes_the_parameters():
    fixed = build.experiment(tiny(schedule__name="cosine"), (8, 8, 1), 17)
    learned = build.experiment(tiny(), (8, 8, 1), 17)
    without, with_schedule = fixed.abstract_state().params, learned.abstract_state().params
    assert with_schedule.keys() - without.keys() == {learned_schedule.SUBTREE}
    assert fixed.schedule is fixed.schedule_of(without)
