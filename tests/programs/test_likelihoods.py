"""eval.likelihood: other likelihoods have their own files and entries, and continue after a signal."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from diffusion import likelihood
from diffusion.evaluation import images
from diffusion.experiment import build, other_likelihood, rules, workdir
from diffusion.programs import evaluate, likelihoods
from diffusion.runtime import preemption, randomness
from diffusion.runtime.preemption import Preempted


def read(directory, name):
    return json.loads((directory / name).read_text())


def weights_by_hand(model, num_images, samples):
    """log w of these test images' trajectories."""
    numbers = images.subset(64, num_images)
    of_split = jax.random.fold_in(randomness.stream(0, "importance"), ("train", "test").index("test"))
    keys = randomness.per_item(of_split, jnp.asarray(numbers))
    x0 = jnp.asarray(toy.source("test").pixels[numbers] / 8 - 1, jnp.float32)
    found = []
    for k in range(samples):
        of_k = jax.vmap(lambda key, k=k: jax.random.fold_in(key, k))(keys)
        given = model.denoise, model.p, model.schedule, x0, of_k, toy.LEVELS
        found.append(likelihood.log_weights_nats(*given))
    return np.stack(found, axis=1)


def test_importance_is_of_the_chain_s_trajectories_goes_on_and_leaves_the_bound_alone(toy_run, monkeypatch):
    """It is stopped after a batch: what was done is on disk, and the same command ends with the same numbers."""
    run, calls = toy_run.directory, []
    (run / "eval.json").write_text('{"test_bpd": 1.5}')
    config = toy_run.config(eval__likelihood="importance(samples=4)", eval__batch_size=8)

    def stop_at_the_second(self):
        calls.append(self)
        if len(calls) == 2:
            raise Preempted("stopped by a signal")

    monkeypatch.setattr(preemption.Preemption, "check", stop_at_the_second)
    with pytest.raises(Preempted):
        evaluate.run(config, run)
    (kept,) = run.glob("evaluations/*/unfinished_eval/*/importance_test.npy")
    assert 0 < np.isfinite(np.load(kept)).sum() < 20 and not (run / "importance.json").exists()
    evaluate.run(config, run)
    (out,) = run.glob("evaluations/step6-exact-learned_range-importance_4-5images-*")
    weights = np.load(out / "importance.npz")["test_log_weights_nats"]
    np.testing.assert_allclose(weights, weights_by_hand(toy_run.model(6), 5, 4), rtol=1e-4)
    scores = read(run, "importance.json")
    by_hand = -jax.nn.logsumexp(jnp.asarray(weights), axis=1) + np.log(4)
    np.testing.assert_allclose(scores["test_importance_bpd"], by_hand.mean() / 64 / np.log(2), rtol=1e-5)
    assert read(run, "eval.json") == {"test_bpd": 1.5} and "test_bpd" not in scores
    assert scores["protocol"]["estimator"].startswith("4 trajectories") and not list(run.rglob("unfinished_eval"))


def test_the_ode_s_density_is_called_so(toy_run):
    config = toy_run.config(eval__likelihood="ode(tolerance=1e-2, probes=0, clip_x0=False)", eval__num_images=2)
    evaluate.run(config, toy_run.directory)
    (out,) = toy_run.directory.glob("evaluations/step6-ode_uniform_0probes_0.01-unclipped-2images-*")
    scores = read(toy_run.directory, "ode.json")
    assert scores == read(out, "ode.json") and np.load(out / "ode.npz")["test_probes_bpd"].shape == (2, 1)
    of_bound = {name for name in scores if name.startswith("test_") and not name.startswith("test_ode_")}
    assert not of_bound and scores["test_ode_density_bpd_probes_stderr"] == 0
    assert scores["protocol"]["likelihood"].startswith("density") and "decoder_cdf" not in scores["protocol"]


def test_a_summary_says_them_beside_the_bound(monkeypatch, layer):
    found = {
        "step": 6, "protocol": {"seed": 0}, "test_importance_bpd": 1.0, "train_importance_ess": 2.0, "ema_sha256": "ab"
    }  # fmt: skip
    monkeypatch.setattr(likelihoods, "score", lambda *given: found)
    assert likelihoods.after_bound(toy.experiment(eval__likelihood="importance")) == {
        "test_importance_bpd": 1.0, "train_importance_ess": 2.0, "importance_protocol": {"seed": 0}
    }  # fmt: skip
    for keys in ({"eval__likelihood": "bound"}, {"eval__likelihood": "ode", "eval__num_images": -1}):
        assert likelihoods.after_bound(toy.experiment(**keys)) == {}


def test_the_bound_s_terms_stay_until_the_other_likelihood_is_measured(toy_run, monkeypatch):
    """A stop in its hours does not cost the bound; at the end nothing is left."""
    config = toy_run.config(eval__likelihood="importance(samples=2)", eval__num_images=5)
    loaded, splits = workdir.load(toy_run.directory, config=config), build.load_splits(config)
    given = loaded.experiment, toy_run.directory / "scores", loaded.model, loaded.state, splits

    def stopped(*given):
        raise Preempted("stopped by a signal")

    with monkeypatch.context() as patched:
        patched.setattr(likelihoods, "score", stopped)
        with pytest.raises(Preempted):
            evaluate.score_run(*given)
    (kept,) = toy_run.directory.glob("scores/unfinished_eval/*/test.npy")
    assert np.isfinite(np.load(kept)).all()
    scores = evaluate.score_run(*given)
    assert {"test_bpd", "test_importance_bpd"} < scores.keys() and not list(toy_run.directory.rglob("unfinished_eval"))


def test_the_ode_s_protocol_has_the_steps_of_its_own_model(toy_run):
    """And not those of the bound of eval.protocol=vdm2021."""
    config = toy_run.config(eval__likelihood="ode(tolerance=1e-2, probes=1)", eval__num_images=2)
    config.eval.protocol = "vdm2021"
    loaded, splits = workdir.load(toy_run.directory), build.load_splits(config)
    experiment = dataclasses.replace(loaded.experiment, config=config)
    given = experiment, toy_run.directory / "scores", loaded.model, loaded.state, splits
    protocol = likelihoods.score(other_likelihood.chosen(config), *given)["protocol"]
    assert protocol["num_steps"] == loaded.model.schedule.num_steps


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"eval__likelihood": "importance(samples=1)"}, "samples=1 must be in 2…1,000,000; one is the bound"),
        ({"eval__likelihood": "ode(tolerance=0.5)"}, "tolerance=0.5 must be in [1e-7, 0.1]"),
        ({"eval__likelihood": "ode(probes=-1)"}, "probes=-1 must be in 0…1000 (0: the exact divergence)"),
        ({"eval__likelihood": "ode", "model__prediction": "mean"}, "predicts x_{t−1}, which has no ODE"),
    ],
)
def test_what_cannot_be_is_one_line_that_names_the_key(keys, words):
    with pytest.raises(ValueError) as error:
        rules.check(toy.config(**keys))
    message = str(error.value)
    assert message.startswith(f"eval.likelihood={keys['eval__likelihood']!r}: ") and words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"eval__terms_per_image": 3, "eval__likelihood": "importance"}, "add --config.eval.terms_per_image=0"),
        ({"eval__protocol": "nichol2021", "eval__likelihood": "ode"}, "add --config.eval.protocol=exact"),
        ({"eval__variance": "fixed_small", "eval__likelihood": "ode"}, "add --config.eval.variance=model"),
    ],
)
def test_a_key_without_a_part_is_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        other_likelihood.alone(toy.config(**keys))
    assert other_likelihood.alone(toy.config(**keys | {"eval__likelihood": "bound"})) is None
    other_likelihood.usable(toy.config(**keys))  # in training the bound is measured, too


def test_several_noises_are_for_every_term():
    with pytest.raises(ValueError, match="eval.noises_per_term=2 needs every term, but eval.terms_per_image=3"):
        rules.check(toy.config(eval__terms_per_image=3, eval__noises_per_term=2))


def test_a_missing_extra_is_named_before_anything_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = toy.config(eval__likelihood="ode(probes=4)")
    with pytest.raises(ValueError, match=r"eval.likelihood='ode\(probes=4\)': it needs the extra ode: pip install"):
        evaluate.run(config, tmp_path)
    rules.check(config)  # a run with this key can still be sampled from
