"""--mode=eval: a checkpoint's scores equal the run's, and evaluations do not disturb each other."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from sklearn import datasets

from diffusion import likelihood
from diffusion.data.source import Splits
from diffusion.evaluation import images
from diffusion.evaluation.bound import Bound
from diffusion.experiment import workdir
from diffusion.experiment.ema import EmaState
from diffusion.programs import evaluate, scored, train
from diffusion.runtime import preemption, randomness
from diffusion.runtime.preemption import Preempted

pytestmark = pytest.mark.usefixtures("programs_compiled_once")


@pytest.fixture
def run(straight, tmp_path):
    """A copy of the finished run to evaluate."""
    return shutil.copytree(straight, tmp_path / "run")


def evaluation(run, name):
    return json.loads((folder(run, name) / "eval.json").read_text())


def folder(run, name):
    """The folder of an evaluation; its name ends with a digest of what was scored."""
    (found,) = (run / evaluate.EVALUATIONS).glob(f"{name}-*")
    return found


def test_the_scores_of_a_checkpoint_are_those_of_the_run(run, straight, tiny, capsys):
    curves = (run / "bpd.npz").read_bytes()
    assert not (run / scored.UNFINISHED).exists()
    evaluate.run(tiny(eval__batch_size=7), run)  # another batch size, the same images and noise
    printed = json.loads(capsys.readouterr().out)
    summary = json.loads((straight / "summary.json").read_text())
    assert printed["ema_sha256"] == summary["ema_sha256"]
    np.testing.assert_allclose(printed["test_bpd"], summary["test_bpd"], rtol=1e-5)
    assert printed == json.loads((run / "eval.json").read_text())
    assert printed == evaluation(run, "step6-exact-learned_range-all-20images")
    assert (run / "bpd.npz").read_bytes() == curves  # what summary.json speaks of


def test_a_class_is_scored_by_its_own_images(straight):
    digits = datasets.load_digits().target[5::6][images.subset(299, 20)]
    of_image = np.load(straight / "bpd.npz")["test_image_bpd"]
    by_class = json.loads((straight / "summary.json").read_text())["test_bpd_by_class"]
    assert len(by_class) == 10
    for digit, bpd in enumerate(by_class):
        own = of_image[digits == digit]
        assert bpd is None if len(own) == 0 else bpd == pytest.approx(own.mean())


def test_each_evaluation_is_named_by_what_was_measured(run, tiny, capsys):
    variants = {
        "step6-exact-learned_range-3terms-20images": {"eval__terms_per_image": 3},
        "step6-exact-fixed_small-all-4images": {"eval__variance": "fixed_small", "eval__num_images": 4},
        "step3-exact-fixed_small-all-4images": {"eval__variance": "fixed_small", "eval__num_images": 4},
    }
    for name, changes in variants.items():
        evaluate.run(tiny(**changes), run, checkpoint=name[4])
    assert {path.name.rpartition("-")[0] for path in (run / evaluate.EVALUATIONS).iterdir()} == variants.keys()
    scores = {name: evaluation(run, name) for name in variants}
    assert [found["step"] for found in scores.values()] == [6, 6, 3]
    assert len({found["test_bpd"] for found in scores.values()}) == 3
    assert json.loads((run / "eval.json").read_text()) == scores["step3-exact-fixed_small-all-4images"]


def test_latest_and_best_are_the_checkpoints_that_the_docs_name(run, tiny):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    assert set(losses) == {3, 6}
    best = workdir.load(run, checkpoint="best").state.step
    assert best == min(losses, key=losses.get)
    assert workdir.load(run).state.step == workdir.load(run, "latest").state.step == 6
    assert workdir.load(run, "3").state.step == 3
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 4 in .* \(sound ones: \[3, 6\]\)"):
        workdir.load(run, "4")
    with pytest.raises(ValueError, match="--checkpoint=bets must be latest, best or the step"):
        workdir.load(run, "bets")


@pytest.mark.parametrize("terms, words", [(0, "all"), (3, "3terms")])
def test_an_evaluation_that_was_stopped_goes_on_and_others_keep_their_terms(run, tiny, monkeypatch, terms, words):
    """It is stopped after some batches: what was scored is on disk, and is not scored again."""
    config = tiny(eval__terms_per_image=terms)
    other = run / scored.UNFINISHED / "of another evaluation" / "test.npy"
    other.parent.mkdir(parents=True)
    other.touch()
    calls = []

    def stop_at_the_second(self):
        calls.append(self)
        if len(calls) == 2:
            raise Preempted("stopped by a signal")

    with monkeypatch.context() as patch:
        patch.setattr(preemption.Preemption, "check", stop_at_the_second)
        with pytest.raises(Preempted):
            evaluate.run(config, run)
        out = folder(run, f"step6-exact-learned_range-{words}-20images")
        (kept,) = (out / scored.UNFINISHED).glob("*/test*.npy")  # of an estimate that of the pilot
        done = ~np.isnan(np.load(kept)[0])
        assert 0 < done.sum() < done.size and not (out / "eval.json").exists()
    evaluate.run(config, run)
    found, summary = (json.loads(path.read_text()) for path in (out / "eval.json", run / "summary.json"))
    error = found["test_bpd_sampling_stderr"]
    np.testing.assert_allclose(found["test_bpd"], summary["test_bpd"], rtol=1e-6, atol=4 * error)
    assert not (out / scored.UNFINISHED).exists()
    assert list((run / scored.UNFINISHED).rglob("*")) == [other.parent, other]


def test_two_evaluations_of_the_same_things_do_not_clash_and_two_of_others_do_not_wait(run, tiny):
    evaluate.run(tiny(), run)
    out = folder(run, "step6-exact-learned_range-all-20images")
    (out / "eval.json").unlink()
    with workdir.locked(out):
        with pytest.raises(ValueError, match="is in use by process"):
            evaluate.run(tiny(), run)
        evaluate.run(tiny(eval__num_images=2), run)
    assert not (out / "eval.json").exists()


def test_the_protocol_says_how_products_were_computed(run, tiny):
    evaluate.run(tiny(eval__num_images=2), run)
    protocol = json.loads((run / "eval.json").read_text())["protocol"]
    assert protocol["matmul_precision"] == "highest" and protocol["network_dtype"] == "float32"


def test_without_a_checkpoint_there_is_nothing_to_score(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        evaluate.run(tiny(), tmp_path)


# --- which numbers these are, by hand


def bound_by_hand(model, split, num_images, clip_x0=True):
    """The mean of these images' bounds in bits/dim, and of the prior's and the decoder's terms."""
    numbers = images.subset(64, num_images)
    assert numbers.tolist() != list(range(num_images))
    key = jax.random.fold_in(randomness.stream(0, "eval"), ("train", "test").index(split))
    keys = randomness.per_item(key, jnp.asarray(numbers))
    x0 = jnp.asarray(toy.source(split).pixels[numbers] / 8 - 1, jnp.float32)
    terms, _ = likelihood.vlb_terms_bpd(model.denoise, model.p, model.schedule, x0, keys, toy.LEVELS, clip_x0)
    prior = jax.vmap(lambda image: likelihood.prior_bpd(model.schedule, image))(x0).mean()
    return terms.sum(axis=1).mean() + prior, prior, terms[:, 0].mean()


def assert_scores_are(scores, model, num_images=5):
    for split in ("test", "train"):
        total, prior, decoder = bound_by_hand(model, split, num_images)
        np.testing.assert_allclose(scores[f"{split}_bpd"], total, rtol=1e-5)
        np.testing.assert_allclose(scores[f"{split}_rate_bpd"], total - decoder, rtol=1e-5)
        np.testing.assert_allclose(scores[f"{split}_distortion_bpd"], decoder, rtol=1e-5)
        assert abs(total - bound_by_hand(model, split, num_images, clip_x0=False)[0]) > 0.1  # the clip matters
    np.testing.assert_allclose(scores["prior_bpd"], bound_by_hand(model, "test", num_images)[1], rtol=1e-5)


@pytest.mark.parametrize(("checkpoint", "step"), [("latest", 6), ("best", 3)])
def test_the_ema_of_the_chosen_checkpoint_is_scored_on_a_random_choice_of_images(toy_run, checkpoint, step):
    evaluate.run(toy_run.config(), toy_run.directory, checkpoint)
    scores = json.loads((toy_run.directory / "eval.json").read_text())
    assert scores["step"] == step and scores["protocol"]["x0_clipped"]
    assert_scores_are(scores, toy_run.model(step))


def test_a_run_is_scored_by_its_last_ema(toy_run):
    train.run(toy_run.config(), toy_run.directory)
    assert_scores_are(json.loads((toy_run.directory / "summary.json").read_text()), toy_run.model(6))


def test_vdm_s_protocol_scores_its_own_number_of_steps_and_the_limit(layer, tmp_path, monkeypatch):
    """What these two compute is for tests/evaluation/test_limit.py."""
    finite = Bound(*np.arange(20.0).reshape(4, 5))
    scored = []

    def estimated(settings, stop):
        def bound(model, source, numbers, kept):
            scored.append((model.host(), source.split, numbers.tolist()))
            return finite

        return bound

    def limit(settings, stop):
        def at_limit(model, source, numbers, other, kept):
            assert (model.host().schedule.num_steps, source.split, other) == (1001, "test", finite)
            return dataclasses.replace(finite, kl_bpd=finite.kl_bpd - 2, sampling_stderr=0.25)

        return at_limit

    monkeypatch.setattr(evaluate, "estimated_bound", estimated)
    monkeypatch.setattr(evaluate, "limit", limit)
    process = {"schedule__name": "linear_gamma(gamma_min=-7.0)", "model__conditioning": "gamma"}
    scoring = {"eval__protocol": "vdm2021", "eval__terms_per_image": 9, "eval__num_images": 5}
    experiment = toy.experiment(**process, model__variance="fixed_small", **scoring)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), experiment.abstract_state().params)
    splits = Splits(toy.source("train"), toy.source("validation"), toy.source("test"))
    scores = evaluate.score(experiment, tmp_path, experiment.model(params), EmaState(np.int32(0), params), splits)
    assert {split for _, split, _ in scored} == {"train", "validation", "test"}
    assert all((model.schedule.num_steps, model.p.decoder) == (1001, "bayes") for model, _, _ in scored)
    assert scores["test_limit_bpd"] == scores["test_bpd"] - 2 and scores["test_limit_bpd_sampling_stderr"] == 0.25
    assert scores["test_limit_bpd_stderr"] == scores["test_bpd_stderr"]
    protocol = scores["protocol"]
    assert (protocol["x0_clipped"], protocol["num_steps"], protocol["decoder"]) == (False, 1001, "bayes")
    assert protocol["limit"] == "T = ∞, two samples of 4 instants"


def test_an_evaluation_locks_the_folder_of_its_results(toy_run, monkeypatch):
    class Locked(Exception):
        pass

    def score(experiment, out, *arguments):
        with pytest.raises(ValueError, match="is in use by process"), workdir.locked(out):
            pass
        raise Locked

    monkeypatch.setattr(evaluate, "score", score)
    with pytest.raises(Locked):
        evaluate.run(toy_run.config(), toy_run.directory)
