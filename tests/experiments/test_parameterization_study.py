"""The study of the four predictions: its checks agree, shares add up, and its report is made from folders."""

import json

import jax
import numpy as np
import pytest

from configs import digits_fixed
from diffusion import schedules
from diffusion.experiment import build, config, workdir
from diffusion.runtime.checkpoint import Checkpoints
from experiments import parameterizations as study
from experiments import results, sweep

NUM_STEPS = 6


def settings_of(prediction="v", variance="learned_range", objective="vlb"):
    settings = digits_fixed.get_config()
    changes = {
        "schedule.num_steps": NUM_STEPS, "unet.channels": 8, "unet.channel_mult": (1,), "unet.num_res_blocks": 1,
        "unet.num_groups": 4, "unet.attention_resolutions": (), "unet.fourier_features": (),
        "model.prediction": prediction, "model.variance": variance, "objective.name": objective,
    }  # fmt: skip
    with settings.unlocked():
        settings.update_from_flattened_dict(changes)
    return settings


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A run with a checkpoint of its initial state."""
    directory = tmp_path_factory.mktemp("network") / "run"
    settings = settings_of()
    workdir.claim(settings, directory)
    with Checkpoints(directory / "checkpoints") as checkpoints:
        checkpoints.save(
            0, jax.device_get(build.experiment(settings, (8, 8, 1), 17).initial_state()), {"val_loss": 1.0}
        )
    return directory


@pytest.fixture(scope="module")
def errors(network):
    return study.network_errors(network, num_images=8)


def test_every_check_agrees_to_float_precision():
    for deviation in study.check(schedules.linear(60)).values():
        kl_in_float32 = deviation.pop("KL, float32 from float64")
        assert max(deviation.values()) < 2e-6 and kl_in_float32 < 1e-3


def test_a_networks_terms_are_its_weighted_errors(errors):
    assert errors.deviation < 1e-4
    # An untrained network outputs about 0, as v the guess x̂_0 = √ᾱ_t x_t: its error is (1 − ᾱ_t)² x_0² + ᾱ_t (1 − ᾱ_t).
    alpha_bar = np.float64(errors.schedule.alpha_bar[1:])
    noise = alpha_bar * (1 - alpha_bar)
    assert np.all((noise * 0.8 < errors.x0_mse) & (errors.x0_mse < noise * 1.2 + (1 - alpha_bar) ** 2))


def test_shares_are_of_the_same_guess(errors):
    shares = study.shares(errors)
    for share in shares.values():
        np.testing.assert_allclose(share.sum(), 1)
    snr = 1 / np.expm1(-np.cumsum(np.float64(errors.schedule.log_alpha))[1:])
    drop, beta_tilde = snr[:-1] - snr[1:], np.float64(errors.schedule.beta_tilde[2:])
    weights = {"eps": drop / snr[1:], "x0": drop, "v": drop / (1 + snr[1:]), "mean": 1 / beta_tilde}
    assert weights.keys() == study.SYMBOLS.keys()
    for prediction, weight in weights.items():
        # L_simple leaves out the weight of the bound's terms.
        unweighted, found = shares["L"][1:] / weight, shares[prediction][1:]
        np.testing.assert_allclose(found / found[0], unweighted / unweighted[0], rtol=1e-4)


def write_run(directory, prediction, objective, image_bpd):
    folder = directory / f"{prediction}-{objective}"
    folder.mkdir()
    settings = settings_of(prediction, "fixed_small", objective)
    (folder / "config.json").write_text(config.to_json(settings))
    terms = image_bpd.mean() * np.array([0.4, 0.2, 0.1, 0.1, 0.1, 0.1])
    np.savez(folder / "bpd.npz", test_image_bpd=image_bpd, test_terms_bpd=terms)
    numbers = {
        "test_bpd": image_bpd.mean(), "test_decoder_bpd": terms[0], "test_kl_bpd": terms[1:].sum(), "prior_bpd": 1e-5,
        "train_bpd": image_bpd.mean(), "test_images": len(image_bpd), "device": "cpu ×1", "versions": {"jax": "0"},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(numbers))


@pytest.mark.slow
def test_the_report_is_made_from_folders(network, tmp_path, capsys, monkeypatch):
    checked = study.check(schedules.linear(60))
    monkeypatch.setattr(study, "check", lambda schedule: checked)  # the long schedules take seconds
    generator = np.random.default_rng(0)
    hardness = generator.normal(3.0, 0.5, 30)
    for i, prediction in enumerate(study.SYMBOLS):
        for j, objective in enumerate(("vlb", "simple")):
            write_run(tmp_path, prediction, objective, hardness + i + 10 * j + generator.normal(0, 0.01, 30))
    assert study.main([f"--workdir={tmp_path}", f"--network={network}", "--report"]) == 0
    text = (tmp_path / "parameterizations.md").read_text()
    assert text in capsys.readouterr().out and "| cosine | x0 | L_simple | " in text and "trained with vlb" in text
    numbers = json.loads((tmp_path / "parameterizations.json").read_text())
    rows = numbers["training"]
    assert [row["prediction"] for row in rows] == [*study.SYMBOLS] * 2
    by_pair = {(row["prediction"], row["objective"]): row for row in rows}
    # v is the third.
    np.testing.assert_allclose(by_pair["eps", "simple"]["less_v_by_seed"], [-2], atol=0.01)
    # An output of 0 says x̂_0 = √ᾱ_t x_t as v; as x_0 it says 0 even where x_t shows every pixel value.
    assert 100 * numbers["output_of_zero_bpd"]["v"] < numbers["output_of_zero_bpd"]["x0"]
    for name in ("weights", "shares", "training"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_every_cell_can_be_trained(capsys):
    assert study.main(["--workdir=none", "--list", "--seed=0,1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 16 and lines[0].endswith(" eps-vlb-fixed_small-cosine-T50-seed0")
    assert study.main(["--workdir=none", "--list", "--schedule=linear", "--prediction=eps,v"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[-1].endswith(" v-simple-fixed_small-linear-T50-seed0")
    with pytest.raises(ValueError, match="^--set eval.terms_per_image=9: an estimate has no term of each t"):
        study.main(["--workdir=none", "--list", "--set", "eval.terms_per_image=9"])
    with pytest.raises(ValueError, match="is an axis of the grid"):
        sweep.grid(study.BASE, study.AXES | {"seed": ["0"]}, {"model.prediction": "v"})


@pytest.mark.parametrize("prediction", ["velocity", "edm"])
def test_a_prediction_that_the_report_lacks_is_refused_before_the_runs_are_made(prediction, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "execute", None)
    words = f"^--prediction: the report has no place for '{prediction}', only for eps, x0, v, mean$"
    with pytest.raises(ValueError, match=words):
        study.main([f"--workdir={tmp_path}", f"--prediction=eps,{prediction}"])


def test_a_network_with_labels_is_refused_before_the_runs_are_made(labelled_run, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "execute", None)
    for flags in ([f"--network={labelled_run}"], ["--set", "model.conditional=True"]):
        source = flags[0].removesuffix("=True")
        with pytest.raises(ValueError, match=f"^{source}: the errors per t are measured without labels"):
            study.main([f"--workdir={tmp_path}", *flags])


def test_a_seed_in_two_folders_counts_once(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_run(tmp_path / folder, "v", "vlb", np.arange(4.0))
        (tmp_path / folder / "v-vlb").rename(tmp_path / f"v-vlb-{folder}")
    (row,) = study.training(results.read(tmp_path)[0])
    assert row["seeds"] == len(row["test_bpd_by_seed"]) == 1


def test_trainings_of_two_lengths_share_no_row(tmp_path):
    """One of them would be left out without a word."""
    for steps, seed in ((10, 0), (20, 1)):
        (tmp_path / str(seed)).mkdir()
        write_run(tmp_path / str(seed), "v", "vlb", np.arange(4.0))
        path = tmp_path / str(seed) / "v-vlb" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"train.num_steps": steps, "seed": seed}))
        path.parent.rename(tmp_path / f"v-vlb-{seed}")
    with pytest.raises(ValueError, match="differ in more than schedule, objective, prediction and seed"):
        study.training(results.read(tmp_path)[0])
