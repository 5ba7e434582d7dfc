"""Training end to end, on the bundled digits with a tiny network: the files of a run, resuming, and errors."""

import json
import shutil

import jax
import numpy as np
import pytest
import toy

from diffusion import data
from diffusion.data import Source
from diffusion.experiment import build, workdir
from diffusion.experiment import config as config_lib
from diffusion.programs import evaluate, sample, train
from diffusion.reporting import loggers, metrics_log
from diffusion.runtime.checkpoint import Checkpoints
from diffusion.runtime.preemption import Preemption
from diffusion.training import loop

pytestmark = pytest.mark.usefixtures("programs_compiled_once")


def rows_without_time(directory):
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in metrics_log.read_metrics(directory)]


def kill():
    raise KeyboardInterrupt


def test_a_run_leaves_everything_it_promises(straight):
    files = {path.name for path in straight.iterdir()}
    assert files >= {"config.json", "metrics.jsonl", "checkpoints", "tensorboard", "samples.png", "samples.npz",
                     "progressive.png", "loss.png", "bpd.png", "bpd.npz", "rate_distortion.png", "summary.json",
                     "samples_4.png", "report.html"}  # fmt: skip
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["step"] == 6 and summary["test_images"] == 20 and summary["device"] == "cpu ×8"
    parts = summary["test_decoder_bpd"] + summary["test_kl_bpd"] + summary["prior_bpd"]
    np.testing.assert_allclose(summary["test_bpd"], parts, rtol=1e-6)
    assert summary["test_bpd_stderr"] > 0 and summary["seconds"] > 0 and summary["versions"]["jax"] == jax.__version__
    with np.load(straight / "bpd.npz") as saved:
        np.testing.assert_allclose(saved["test_image_bpd"].mean(), summary["test_bpd"], rtol=1e-6)
        np.testing.assert_allclose(saved["test_terms_bpd"].sum() + summary["prior_bpd"], summary["test_bpd"], rtol=1e-6)
        np.testing.assert_allclose(saved["test_rate_bpd"][0], summary["test_rate_bpd"], rtol=1e-6)
        np.testing.assert_allclose(saved["test_rate_bpd"][-1], summary["prior_bpd"], rtol=1e-6)
        np.testing.assert_allclose(saved["test_distortion_rmse"][0], summary["test_distortion_rmse"], rtol=1e-6)
        assert json.loads(str(saved["protocol"])) == summary["protocol"]
    assert summary["protocol"] == {
        "name": "exact", "decoder_cdf": "exact", "x0_clipped": True, "parameters": "EMA, decay 0.99",
        "variance": "learned_range", "schedule": "cosine", "num_steps": 6,
        "estimator": "every term", "draws_per_term": 1, "matmul_precision": "highest", "network_dtype": "float32",
        "seed": 0,
        "test_images": "20 of 299", "train_images": "20 of 1368", "validation_images": "20 of 130",
    }  # fmt: skip
    images = np.load(straight / "samples.npz")["images"]
    assert images.shape == (9, 8, 8, 1) and images.dtype == np.uint8 and images.max() <= 16
    rows = metrics_log.read_metrics(straight)
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    assert all("val_loss" in row and row["validation_images"] == 130 for row in rows if row["step"] in (3, 6))
    assert summary["validation_images"] == 130 and summary["validation_bpd"] > 0


def test_no_test_image_is_looked_at_before_the_run_is_scored(tiny, tmp_path, monkeypatch):
    events, images, labels, score = [], Source.images, Source.labels, evaluate.score_run

    def noted(read):
        def reading(source, *which, **how):
            events.append(source.split)
            return read(source, *which, **how)

        return reading

    def scoring(*args):
        events.append("scoring")
        return score(*args)

    monkeypatch.setattr(Source, "images", noted(images))
    monkeypatch.setattr(Source, "labels", noted(labels))
    monkeypatch.setattr(evaluate, "score_run", scoring)
    train.run(tiny(quality__every=3, quality__num_images=20, quality__reference="validation"), tmp_path / "run")
    begin = events.index("scoring")
    assert set(events[:begin]) == {"train", "validation"}
    assert events[begin:].count("test") >= 1


def test_where_nothing_is_set_aside_nothing_ranks_the_checkpoints(tiny, tmp_path):
    config = tiny(data__validation=0, sample__num_images=1, train__sample_every=0)
    train.run(config, tmp_path / "run")
    rows = metrics_log.read_metrics(tmp_path / "run")
    assert not any("val_loss" in row for row in rows) and rows[-1]["validation_images"] == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["validation_images"] == 0 and "validation_bpd" not in summary
    with pytest.raises(ValueError, match="nothing unseen ranks the checkpoints of .*run: data.validation is 0"):
        evaluate.run(config, tmp_path / "run", "best")


def test_a_stopped_run_resumes_bit_identically(labelled_run, conditional, tmp_path, monkeypatch):
    """A U-Net whose dropout and left out labels are drawn anew in every step."""
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        toy.interrupt(patched, (5,), kill)
        train.run(conditional(), tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()
    assert [row["step"] for row in metrics_log.read_metrics(tmp_path / "run")] == [2, 3, 4]
    text = (tmp_path / "run" / "report.html").read_text()
    assert "unfinished: step 4 of 6" in text and "Samples at step 4" in text and "The loss over training steps" in text
    train.run(conditional(), tmp_path / "run")
    one, two = (json.loads((run / "summary.json").read_text()) for run in (labelled_run, tmp_path / "run"))
    for key in one.keys() - {"seconds"}:
        assert one[key] == two[key], key
    assert rows_without_time(labelled_run) == rows_without_time(tmp_path / "run")
    np.testing.assert_array_equal(*(np.load(run / "samples.npz")["images"] for run in (labelled_run, tmp_path / "run")))


def test_a_finished_run_says_so_and_does_nothing(straight, tiny, capsys):
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    train.run(tiny(sample__num_images=3), straight)
    assert "finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in straight.rglob("*")}


def test_a_finished_run_is_not_made_longer_where_its_learning_rate_would_have_been_another(straight, tiny):
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    with pytest.raises(ValueError, match=r"train.num_steps: 6 → 9, on which optim.decay='cosine' depends\); give"):
        train.run(tiny(train__num_steps=9), straight)
    assert before == {path: path.stat().st_mtime_ns for path in straight.rglob("*")}


@pytest.fixture
def leg(tmp_path, monkeypatch, layer):
    """(name, changes) -> the summary of a small run in the directory `name`, and the config that was taken."""
    monkeypatch.setattr(data, "load", lambda name, split, *_: toy.source(split))
    monkeypatch.setattr(data, "describe", lambda *_: data.Description("toy", 64, 64, toy.SHAPE, toy.LEVELS, 0))

    def run(name, allow_other_data=False, **changes):
        small = {"optim__decay": "constant", "schedule__num_steps": 3, "eval__num_images": 2, "sample__num_images": 2}
        config = toy.config(**small | changes)
        train.run(config, tmp_path / name, allow_other_data=allow_other_data)
        return json.loads((tmp_path / name / "summary.json").read_text()), config

    return run


def test_a_run_that_only_trains_is_finished_and_is_sampled_and_scored_later(leg, tmp_path, capsys):
    changes = {"train__num_steps": 3, "train__sample_every": 2, "train__validate_every": 1}
    summary, config = leg("run", **changes, eval__num_images=-1, sample__num_images=0)
    run = tmp_path / "run"
    whole, _ = leg("whole", **changes)
    of_scores = {name for name in whole if "bpd" in name or name.endswith(("_distortion_rmse", "_stderr"))}
    of_scores |= {"protocol", "test_images", "train_images", "test_numbers_sha256"}
    assert summary.keys() == whole.keys() - of_scores
    assert all(summary[name] == whole[name] for name in summary.keys() - {"seconds"})
    assert {"step", "num_params", "versions", "device", "params_sha256", "ema_sha256"} <= summary.keys()
    assert not [*run.glob("samples*"), *run.glob("bpd*"), *run.glob("progressive*")] and (run / "loss.png").exists()
    assert "trained to step 3 and not scored (eval.num_images=-1); see" in capsys.readouterr().out
    page = (run / "report.html").read_text()
    assert "finished at step 3" in page and "the run was not scored" in page
    assert "the run was not scored" not in (tmp_path / "whole" / "report.html").read_text()
    train.run(config, run)
    assert "holds this run, finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match="eval.num_images=-1 scores no image; --config.eval.num_images=0 scores"):
        evaluate.run(config, run)
    with pytest.raises(ValueError, match="sample.num_images=0 draws no image"):
        sample.run(config, run)
    config.eval.num_images = 2
    evaluate.run(config, run)
    assert json.loads((run / "eval.json").read_text())["test_bpd"] == whole["test_bpd"]


@pytest.mark.slow
def test_a_run_that_goes_on_with_other_means_is_the_run_that_had_them_all_along(leg, tmp_path):
    at_once, _ = leg("at_once", train__num_steps=8, train__log_every=1, sample__num_images=0)
    first, _ = leg("legs", train__num_steps=5, train__log_every=2, sample__num_images=0)
    shutil.copytree(tmp_path / "legs", tmp_path / "thrifty")
    (tmp_path / "legs" / "seconds.json").write_text('{"seconds": 5000.0}')
    others = {"train__checkpoint_every": 4, "train__keep_checkpoints": 1, "train__steps_per_call": 7}
    others |= {"sample__num_images": 0}
    second, config = leg("legs", train__num_steps=8, train__log_every=3, **others)
    thrifty, _ = leg("thrifty", train__num_steps=8, train__grad_accum=2, unet__remat=True, sample__num_images=0)

    assert (first["step"], second["step"]) == (5, 8)
    for key in at_once.keys() - {"seconds"}:
        assert second[key] == at_once[key], key
    np.testing.assert_allclose(thrifty["test_bpd"], at_once["test_bpd"], rtol=1e-5)
    # The first leg's summary stays, the time of all legs counts, and the config is that of the last one.
    assert json.loads((tmp_path / "legs" / "summary_5.json").read_text()) == first
    assert 0 < first["seconds"] < 5000 < second["seconds"] < 6000
    saved = workdir.read_config(tmp_path / "legs")
    assert config_lib.flatten(saved) == config_lib.flatten(config)

    # The window of step 5 goes on: it began at a multiple of the old log_every.
    assert_rows_are_means(tmp_path, "legs", {2: (1, 2), 4: (3, 4), 5: (5,), 6: (5, 6), 8: (7, 8)})


def darker(split):
    """The toy's data with one pixel of the split changed: names and sizes are equal."""
    source = toy.source(split)
    source.pixels[7, 3, 2] ^= 1
    return source


def test_a_run_does_not_go_on_with_other_data_unless_it_is_told_to(leg, tmp_path, monkeypatch):
    first, _ = leg("run", train__num_steps=3)
    then, now = ({split: of(split).sha256() for split in ("train", "test")} for of in (toy.source, darker))
    assert first["data_sha256"] == then
    monkeypatch.setattr(data, "load", lambda name, split, *_: darker(split))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="the train split of data.name='digits'"):
        leg("run", train__num_steps=5)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    second, _ = leg("run", train__num_steps=5, allow_other_data=True)
    assert second["step"] == 5 and second["data_sha256"] == now == saved_data(tmp_path / "run", 5)


def test_which_data_a_checkpoint_goes_on_with(tmp_path):
    config, then, now = toy.config(), {"train": "a" * 64}, {"train": "b" * 64}
    train.check_data(config, tmp_path, now)  # there is no checkpoint yet
    with Checkpoints(tmp_path / "checkpoints", data_sha256=then) as checkpoints:
        checkpoints.save(1, {"params": np.zeros(3)}, {})
    train.check_data(config, tmp_path, then)
    with pytest.raises(ValueError) as error:
        train.check_data(config, tmp_path, now)
    assert str(error.value) == (
        "the train split of data.name='digits' in data.data_dir='' is not the one that this run was trained with "
        "(SHA-256 aaaaaaaaaaaa then, bbbbbbbbbbbb now); set data.data_dir to where the run's data lies, or add "
        "--allow_other_data to go on with the new data"
    )
    path = tmp_path / "checkpoints" / "1" / "digests" / "metadata"  # earlier versions did not write it
    without = {k: v for k, v in json.loads(path.read_text()).items() if k != "data_sha256"}
    for text in (json.dumps(without), "{"):  # and a damaged file is what `resume` speaks of
        path.write_text(text)
        train.check_data(config, tmp_path, now)


def saved_data(directory, step):
    """Which data the newest checkpoint, that of `step`, was trained on."""
    with Checkpoints(directory / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == step
        return checkpoints.trained_on()


def assert_rows_are_means(directory, name, means):
    """The rows of a run are the means over these steps of what the run `at_once` logged at every step."""
    steps = {row["step"]: row["loss"] for row in metrics_log.read_metrics(directory / "at_once")}
    rows = {row["step"]: row["loss"] for row in metrics_log.read_metrics(directory / name) if "loss" in row}
    assert rows.keys() == means.keys()
    for step, averaged in means.items():
        np.testing.assert_allclose(rows[step], np.mean([steps[i] for i in averaged]), rtol=1e-6)


def test_a_window_starts_anew_at_a_multiple_of_the_log_every_that_a_run_goes_on_with(leg, tmp_path, monkeypatch):
    leg("at_once", train__num_steps=9, train__log_every=1)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        toy.interrupt(patched, (6,), kill)
        leg("legs", train__num_steps=9, train__log_every=4, train__checkpoint_every=3)
    leg("legs", train__num_steps=9, train__log_every=3)
    assert_rows_are_means(tmp_path, "legs", {4: (1, 2, 3, 4), 9: (7, 8, 9)})


@pytest.mark.parametrize(("wanted", "followed"), [(256, 130), (7, 7), (1000, 130)])
def test_how_many_images_are_scored_does_not_change_which_are_followed(tiny, tmp_path, monkeypatch, wanted, followed):
    class Seen(Exception):
        pass

    def monitor(training, seed, num_steps, validation_set, numbers, with_decoder):
        assert with_decoder
        raise Seen(numbers)

    monkeypatch.setattr(loop, "monitor", monitor)
    seen = []
    for num_images in (0, 3):
        config = tiny(train__monitor_images=wanted, eval__num_images=num_images)
        experiment = build.experiment(config, (8, 8, 1), 17)
        splits = build.load_splits(config)
        with pytest.raises(Seen) as raised:
            train.train(experiment, tmp_path, splits, sample.make_sampler(experiment), Preemption())
        seen.append(raised.value.args[0])
    np.testing.assert_array_equal(*seen)
    assert len(set(seen[0])) == followed


def test_a_run_that_was_trained_but_not_scored_is_scored(straight, tiny, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    train.run(tiny(), tmp_path / "run")
    one, two = (json.loads((run / "summary.json").read_text()) for run in (straight, tmp_path / "run"))
    assert {key: one[key] for key in one if key != "seconds"} == {key: two[key] for key in two if key != "seconds"}
    assert metrics_log.read_metrics(straight) == metrics_log.read_metrics(tmp_path / "run")


def test_another_config_is_refused_and_nothing_changes(straight, tiny, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    for mode in (train, evaluate, sample):
        with pytest.raises(ValueError, match=r"another config \(optim.learning_rate: 0.00\d+ → 0.5; seed: 0 → 7\)"):
            mode.run(tiny(seed=7, optim__learning_rate=0.5), tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_text() == (straight / "config.json").read_text()


def test_a_batch_that_does_not_divide_is_refused_by_name(tiny, tmp_path):
    with pytest.raises(ValueError, match="train.batch_size=12 does not divide by 8 devices"):
        train.run(tiny(train__batch_size=12), tmp_path / "run")
    with pytest.raises(ValueError, match=r"train.batch_size=16 does not divide by 8 devices × train.grad_accum=4"):
        train.run(tiny(train__grad_accum=4), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_nan_stops_the_run_and_names_step_and_term(tiny, tmp_path):
    config = tiny()
    experiment = build.experiment(config, (8, 8, 1), 17)
    start = jax.device_get(experiment.initial_state())
    poisoned = start.replace(params=jax.tree.map(lambda leaf: leaf * np.nan, start.params))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(0, poisoned, {})
    splits = build.load_splits(config)
    with pytest.raises(FloatingPointError, match=r"step 1: .*loss = nan.*vlb_bpd = nan"):
        train.train(experiment, tmp_path, splits, sample.make_sampler(experiment), Preemption())
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 0


def test_samples_are_not_compared_with_test_images_during_training(tiny, tmp_path):
    with pytest.raises(ValueError, match="quality.every=5 scores samples during training"):
        train.run(tiny(quality__every=5, quality__reference="test"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_logger_without_its_package_is_refused_before_anything_is_written(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(loggers.NEEDS, "wandb", "no_such_package")
    with pytest.raises(ValueError, match="train.loggers has wandb, which needs the package no_such_package: pip inst"):
        train.run(tiny(train__loggers=("wandb",)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_optimal_variance_needs_a_trained_mean(tiny, tmp_path):
    for changes in ({"eval__variance": "optimal"}, {"sample__variance": "optimal"}):
        with pytest.raises(ValueError, match="which needs a trained mean"):
            train.run(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
