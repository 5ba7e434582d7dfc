"""Training end to end, on the bundled digits with a tiny network: resuming, devices, logs and files."""

import dataclasses
import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from diffusion import data
from diffusion.evaluation import bound
from diffusion.experiment import build
from diffusion.programs import evaluate, sample, train
from diffusion.reporting import metrics_log
from diffusion.runtime import checkpoint
from diffusion.runtime.preemption import Preemption
from diffusion.training import devices
from diffusion.training.step import group_norms, to_levels, to_unit, train_step


@pytest.fixture(scope="module", autouse=True)
def data_dir(tmp_path_factory):
    """A data directory of the tests' own, prepared once."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("data")))
    yield
    patch.undo()


def tiny(**keys):
    """A config whose every part is real and small."""
    config = digits.get_config()
    small = {
        "schedule.num_steps": 6, "unet.channels": 8, "unet.channel_mult": (1, 1), "unet.num_res_blocks": 1, "unet.num_groups": 4,
        "unet.dropout": 0.1, "unet.attention_resolutions": (4,), "unet.fourier_features": (), "data.flip": True,
        "train.batch_size": 16, "train.num_steps": 6, "train.log_every": 2, "train.checkpoint_every": 3,
        "train.sample_every": 4, "eval.num_images": 20, "eval.batch_size": 16, "sample.num_images": 9,
        "optim.warmup_steps": 2,
    }  # fmt: skip
    with config.unlocked():
        config.update_from_flattened_dict(small | {key.replace("__", "."): value for key, value in keys.items()})
    return config


def rows_without_time(directory):
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in metrics_log.read_metrics(directory)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, data_dir):
    """A run that was never stopped."""
    directory = tmp_path_factory.mktemp("runs") / "straight"
    train.run(tiny(), directory)
    return directory


def test_a_run_leaves_everything_it_promises(straight):
    files = {path.name for path in straight.iterdir()}
    assert files >= {"config.json", "metrics.jsonl", "checkpoints", "tensorboard", "samples.png", "samples.npz",
                     "progressive.png", "loss.png", "bpd.png", "bpd.npz", "rate_distortion.png", "summary.json",
                     "samples_4.png"}  # fmt: skip
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
        "estimator": "every term", "draws_per_term": 1, "seed": 0,
        "test_images": "20 of 299", "train_images": "20 of 1498",
    }  # fmt: skip
    images = np.load(straight / "samples.npz")["images"]
    assert images.shape == (9, 8, 8, 1) and images.dtype == np.uint8 and images.max() <= 16
    rows = metrics_log.read_metrics(straight)
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    assert all("test_loss" in row for row in rows if row["step"] in (3, 6))


def test_a_stopped_run_resumes_bit_identically(straight, tmp_path, monkeypatch):
    batch_indices, killed_at = data.batch_indices, 5

    def killed(seed, step, *sizes):
        if step == killed_at:
            raise KeyboardInterrupt
        return batch_indices(seed, step, *sizes)

    monkeypatch.setattr(data, "batch_indices", killed)
    with pytest.raises(KeyboardInterrupt):
        train.run(tiny(), tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()
    assert [row["step"] for row in metrics_log.read_metrics(tmp_path / "run")] == [2, 3, 4]
    killed_at = -1
    train.run(tiny(), tmp_path / "run")
    one, two = (json.loads((run / "summary.json").read_text()) for run in (straight, tmp_path / "run"))
    for key in one.keys() - {"seconds"}:
        assert one[key] == two[key], key
    assert rows_without_time(straight) == rows_without_time(tmp_path / "run")
    np.testing.assert_array_equal(*(np.load(run / "samples.npz")["images"] for run in (straight, tmp_path / "run")))


def test_a_finished_run_says_so_and_does_nothing(straight, capsys):
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    train.run(tiny(sample__num_images=3), straight)
    assert "finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in straight.rglob("*")}


def test_a_run_that_was_trained_but_not_scored_is_scored(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    train.run(tiny(), tmp_path / "run")
    one, two = (json.loads((run / "summary.json").read_text()) for run in (straight, tmp_path / "run"))
    assert {key: one[key] for key in one if key != "seconds"} == {key: two[key] for key in two if key != "seconds"}
    assert metrics_log.read_metrics(straight) == metrics_log.read_metrics(tmp_path / "run")


def test_another_config_is_refused_and_nothing_changes(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    for mode in (train, evaluate, sample):
        with pytest.raises(ValueError, match=r"another config \(optim.learning_rate: 0.00\d+ → 0.5; seed: 0 → 7\)"):
            mode.run(tiny(seed=7, optim__learning_rate=0.5), tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_text() == (straight / "config.json").read_text()


def test_evaluation_and_sampling_of_a_checkpoint_repeat_the_run(straight, tmp_path, capsys):
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
    sample.run(tiny(sample__batch_size=5), tmp_path / "run")
    again, before = (np.load(run / "samples.npz")["images"] for run in (tmp_path / "run", straight))
    # A grey level may round the other way where the batch size changed the order of sums.
    assert np.mean(again != before) < 0.01 and np.abs(again.astype(int) - before).max() <= 1
    sample.run(tiny(sample__method="ddim", sample__num_steps=3, sample__num_images=2), tmp_path / "run")
    assert len(np.load(tmp_path / "run" / "samples.npz")["images"]) == 2


def test_nothing_to_restore_is_one_sentence(tmp_path):
    for mode in (evaluate, sample):
        with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
            mode.run(tiny(), tmp_path)


def test_a_batch_that_does_not_divide_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="train.batch_size=12 does not divide by 8 devices"):
        train.run(tiny(train__batch_size=12), tmp_path / "run")
    with pytest.raises(ValueError, match=r"train.batch_size=16 does not divide by 8 devices × train.grad_accum=4"):
        train.run(tiny(train__grad_accum=4), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Steps:
    """A few train steps by hand: on 8 devices with pmap, or on one; each compiled once."""

    def __init__(self, **keys):
        self.config = tiny(**keys)
        self.images = data.load("digits", "train").images
        self.experiment = build.experiment(self.config, (8, 8, 1), 17)
        self.start = jax.device_get(self.experiment.initial_state())
        self.pmapped = devices.train_steps(self.experiment.training)
        one = partial(train_step, self.experiment.training, axis_name="devices")
        self.single = jax.jit(jax.vmap(one, axis_size=1, axis_name="devices", in_axes=(None, None, 0)))

    def indices(self, step):
        return data.batch_indices(0, step, self.config.train.batch_size, len(self.images))

    def on_all_devices(self, num_steps):
        state, images = devices.replicate(self.start), devices.replicate(self.images)
        for step in range(num_steps):
            state, metrics = self.pmapped(state, images, devices.shard_steps(self.indices(step)[None]))
        return state, metrics

    def on_one_device(self, num_steps):
        state = self.start
        for step in range(num_steps):
            batched, metrics = self.single(state, jnp.asarray(self.images), self.indices(step)[None])
            state = jax.tree.map(lambda leaf: leaf[0], batched)
        return state, metrics


@pytest.fixture(scope="module")
def steps(data_dir):
    return Steps()


def assert_same_parameters(a, b):
    # Adam divides by √v, so a rounding in a gradient near 0 may move a parameter by a part of the learning rate.
    for one, other in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


def test_eight_devices_take_the_same_steps_as_one(steps):
    many, metrics = steps.on_all_devices(3)
    one, one_metrics = steps.on_one_device(3)
    np.testing.assert_allclose(metrics["loss"][0], one_metrics["loss"], rtol=1e-5)
    for leaf in jax.tree.leaves(many.params):
        copies = np.asarray(leaf)
        np.testing.assert_array_equal(copies, np.broadcast_to(copies[:1], copies.shape))  # replicas stay equal
    assert_same_parameters(devices.unreplicate(many), one)


def test_accumulated_gradients_are_the_batch_gradient(steps):
    whole, metrics = steps.on_one_device(2)
    pieces, piece_metrics = Steps(train__grad_accum=2).on_one_device(2)
    np.testing.assert_allclose(metrics["grad_norm"], piece_metrics["grad_norm"], rtol=1e-4)
    assert_same_parameters(whole, pieces)


def test_several_steps_in_one_call_are_the_same_steps(steps):
    single, _ = steps.on_all_devices(2)
    indices = np.stack([steps.indices(0), steps.indices(1)])
    state, images = devices.replicate(steps.start), devices.replicate(steps.images)
    both, metrics = steps.pmapped(state, images, devices.shard_steps(indices))
    assert metrics["loss"].shape == (8, 2)
    norms = group_norms(steps.start.params)  # those before the call, for both of its steps
    np.testing.assert_allclose(metrics["param_norms"], np.broadcast_to(norms, (8, 2, len(norms))), rtol=1e-5)
    assert_same_parameters(devices.unreplicate(single), devices.unreplicate(both))


def test_the_step_compiles_once_moves_nothing_and_reuses_the_state(steps):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **kw: compiled.append(seconds) if "backend_compile" in event else None
    )
    state, images = devices.replicate(steps.start), devices.replicate(steps.images)
    step_fn, counts = devices.train_steps(steps.experiment.training), []
    for step in range(4):
        # What a call moves between host and devices, or between devices, must be asked for: the indices alone are.
        indices, before = devices.shard_steps(steps.indices(step)[None]), state
        with jax.transfer_guard("disallow" if step else "allow"):
            state, _ = step_fn(state, images, indices)
        counts.append(len(compiled))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before)), "the state's memory was not donated"
    assert counts[0] > 0, "the listener heard nothing"
    assert counts[1:] == [counts[0]] * 3


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_term(steps, tmp_path):
    poisoned = steps.start.replace(params=jax.tree.map(lambda leaf: leaf * np.nan, steps.start.params))
    train_set, test_set = data.load("digits", "train"), data.load("digits", "test")
    with checkpoint.Checkpoints(tmp_path / "checkpoints") as checkpoints:
        with pytest.raises(FloatingPointError, match=r"step 1: .*loss = nan.*vlb_bpd = nan"):
            train.train(
                steps.experiment,
                tmp_path,
                poisoned,
                train_set,
                test_set,
                checkpoints,
                lambda params: None,
                Preemption(),
            )
        assert checkpoints.latest_step() is None


def test_the_window_is_the_mean_since_the_last_row(steps, straight):
    """`loss` of a row averages the steps since the row before; here checked against the steps themselves."""
    losses = [float(steps.on_all_devices(n)[1]["loss"][0, 0]) for n in (1, 2)]
    row = metrics_log.read_metrics(straight)[0]
    np.testing.assert_allclose(row["loss"], np.mean(losses), rtol=1e-5)


def test_ema_and_warmup_follow_their_formulas(steps):
    config = steps.config
    first, second = (steps.on_one_device(n)[0] for n in (1, 2))
    for a, b in zip(jax.tree.leaves(steps.start.params), jax.tree.leaves(first.params), strict=True):
        np.testing.assert_array_equal(a, b)  # the warm-up starts at 0
    decay, moved = config.ema.decay, 0.0
    trees = (first.ema_params, second.params, second.ema_params)
    for before, params, ema in zip(*(jax.tree.leaves(tree) for tree in trees), strict=True):
        np.testing.assert_allclose(ema, decay * before + (1 - decay) * params, rtol=1e-6, atol=1e-8)
        moved = max(moved, float(jnp.abs(params - before).max()))
    # Adam's first steps are about as long as the learning rate, of which the warm-up has done one of two steps.
    np.testing.assert_allclose(moved, config.optim.learning_rate / config.optim.warmup_steps, rtol=0.5)


def test_grey_levels_survive_the_way_to_the_unit_interval_and_back():
    for num_levels in (17, 256):
        levels = np.arange(num_levels, dtype=np.uint8)
        x = to_unit(jnp.asarray(levels), num_levels)
        assert x[0] == -1 and np.isclose(x[-1], 1)
        np.testing.assert_array_equal(to_levels(x, num_levels), levels)


def test_padded_batches_hold_every_item_once():
    for num_items, batch_size in ((20, 16), (3, 256), (16, 16), (17, 8), (1, 1)):
        seen = [
            number for batch, real in devices.padded_batches(num_items, batch_size) for number in batch.ravel()[:real]
        ]
        assert seen == list(range(num_items))
        shapes = {batch.shape for batch, _ in devices.padded_batches(num_items, batch_size)}
        assert len(shapes) == 1 and shapes.pop()[0] == 8


def test_the_bound_counts_every_image_once(straight):
    """20 images in batches of 16 on 8 devices, the last one padded, equal each image scored alone."""
    experiment = build.experiment(tiny(), (8, 8, 1), 17)
    params = devices.replicate(jax.device_get(experiment.initial_state().params))
    test_set, numbers = data.load("digits", "test"), np.arange(20, 31)
    whole = evaluate.bound_of(experiment)(params, test_set, numbers)
    assert whole.terms_bpd.shape == (11, 6)
    one = build.experiment(tiny(eval__batch_size=8), (8, 8, 1), 17)
    again = evaluate.bound_of(one)(params, test_set, numbers[3:])  # fewer images: each keeps its own noise
    np.testing.assert_allclose(again.image_bpd, whole.image_bpd[3:], rtol=1e-5)
    other_split = dataclasses.replace(test_set, split="train")
    assert not np.allclose(evaluate.bound_of(one)(params, other_split, numbers[3:]).image_bpd, again.image_bpd)
    summary = whole.summary("test")
    np.testing.assert_allclose(summary["test_bpd"], whole.image_bpd.mean())


def test_a_bound_that_was_cut_computes_what_is_missing(tmp_path):
    """Finished terms are read from the file and not computed again; the others come out as without a file."""
    experiment = build.experiment(tiny(eval__batch_size=16), (8, 8, 1), 17)
    params = devices.replicate(jax.device_get(experiment.initial_state().params))
    score, test_set, numbers = bound.bound_of(experiment), data.load("digits", "test"), np.arange(5)
    whole, kept = score(params, test_set, numbers), tmp_path / "kept" / "test.npy"
    np.testing.assert_array_equal(score(params, test_set, numbers, kept).terms_bpd, whole.terms_bpd)
    terms = np.load(kept, mmap_mode="r+")
    terms[0, :3], terms[0, 3:] = 7.0, np.nan
    terms.flush()
    again = score(params, test_set, numbers, kept).terms_bpd
    np.testing.assert_array_equal(again[:3], 7.0)
    np.testing.assert_allclose(again[3:], whole.terms_bpd[3:], rtol=1e-5)


def test_the_estimate_is_of_the_full_evaluation():
    """From the same terms: the decoder's are equal, the sum of the others is as far off as stated."""
    test_set, numbers = data.load("digits", "test"), np.arange(60)
    few = build.experiment(tiny(eval__terms_per_image=3, eval__batch_size=64), (8, 8, 1), 17)
    params = devices.replicate(jax.device_get(few.initial_state().params))
    estimate = bound.estimated_bound_of(few)(params, test_set, numbers)
    full = bound.bound_of(build.experiment(tiny(eval__batch_size=64), (8, 8, 1), 17))(params, test_set, numbers)
    np.testing.assert_allclose(estimate.decoder_bpd, full.decoder_bpd, rtol=1e-5)
    np.testing.assert_allclose(estimate.decoded_mse, full.decoded_mse, rtol=1e-5)
    np.testing.assert_allclose(estimate.prior_bpd, full.prior_bpd, rtol=1e-5)
    assert 0 < estimate.sampling_stderr < 0.2 * full.kl_bpd.mean() and full.sampling_stderr == 0
    assert abs(estimate.image_bpd.mean() - full.image_bpd.mean()) < 3 * estimate.sampling_stderr


def test_ho_et_al_drop_the_remainder_of_256():
    for num_images, num_test, scored in ((0, 10_000, 9_984), (1000, 10_000, 768), (256, 299, 256)):
        config = tiny(eval__protocol="ho2020", eval__num_images=num_images)
        assert evaluate.num_scored(config, num_test) == scored
    assert evaluate.num_scored(tiny(eval__num_images=0), 299) == 299
    with pytest.raises(ValueError, match=r"eval.protocol='ho2020' scores multiples of 256 images, not 20 \("):
        evaluate.num_scored(tiny(eval__protocol="ho2020"), 299)
    with pytest.raises(ValueError, match="eval.num_images=300 exceeds the 299"):
        evaluate.num_scored(tiny(eval__num_images=300), 299)


def test_a_subset_is_drawn_from_the_whole_set():
    chosen = evaluate.subset(1000, 100)
    assert len(np.unique(chosen)) == 100 and np.all(np.diff(chosen) > 0)
    assert np.bincount(chosen // 100, minlength=10).min() > 0  # every tenth of a set that is sorted by class
    np.testing.assert_array_equal(evaluate.subset(1000, 1000), np.arange(1000))
