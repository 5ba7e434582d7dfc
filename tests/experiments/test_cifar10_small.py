"""The study on photographs: the runs that it compares, and the table of their accounting."""

import csv
import json
from pathlib import Path

import pytest

from diffusion.experiment import config as config_lib
from diffusion.experiment import rules
from experiments import cifar10_small, variance_accounting

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def configs():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        cells = cifar10_small.cells({"data.data_dir": "prepared"})
        return {cell.name: config_lib.flatten(cell.config()) for cell in cells}


def test_all_runs_can_be_trained_and_take_the_given_keys():
    for cell in cifar10_small.cells({"data.data_dir": "prepared"}):
        rules.check(cell.config())
        assert cell.config().data.data_dir == "prepared"


def test_the_papers_runs_differ_in_objective_and_variance_alone(configs):
    papers = [config for name, config in configs.items() if name != "own-recipe"]
    differ = {key for key in papers[0] if len({str(config[key]) for config in papers}) > 1}
    assert len(papers) == 4 and differ == {"objective.name", "model.variance"}


def test_every_run_sees_100_000_images_and_scores_the_whole_test_split(configs):
    for config in configs.values():
        assert config["train.num_steps"] * config["train.batch_size"] == 100_000
        assert (config["eval.num_images"], config["eval.terms_per_image"]) == (0, 9)
        assert config["schedule.num_steps"] == 1000


def saved(directory, rows):
    """A run's folder with its accounting: (variance, bits/dim, their error, less the own variance's, its error)."""
    directory.mkdir()
    with (directory / f"{variance_accounting.FILE}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("variance", "bpd", "stderr", "difference", "difference_stderr"), *rows])
    return directory


def test_the_accounting_has_a_row_per_variance_and_a_column_per_run(tmp_path):
    one = saved(tmp_path / "one", [("fixed_small", 4.5, 0.02, 0, 0), ("optimal", 4.25, 0.01, -0.25, 0.005)])
    two = saved(tmp_path / "two", [("learned_range", 4.125, 0.03, 0, 0), ("fixed_small", 4.0, 0.04, -0.125, 0.006)])
    lines = [line for line in cifar10_small.accounting([one, two]).splitlines() if line.startswith("|")]
    assert lines[:5] == [
        "| variance | one | two |",
        "|---|---|---|",
        "| fixed_small | 4.500 ± 0.020 | 4.000 ± 0.040 |",
        "| optimal | 4.250 ± 0.010 | – |",
        "| learned_range | – | 4.125 ± 0.030 |",
    ]
    assert lines[7:] == [
        "| fixed_small | – | -0.1250 ± 0.0060 |",
        "| optimal | -0.2500 ± 0.0050 | – |",
        "| learned_range | – | – |",
    ]


def test_the_accounting_of_several_seeds_is_their_mean_and_interval(tmp_path):
    runs = [
        saved(tmp_path / f"one{ending}", [("optimal", bpd, 0.02, 2 * bpd, 0.01)])
        for ending, bpd in (("", 4.0), ("-seed1", 4.1), ("-seed2", 4.2))
    ]
    runs.append(saved(tmp_path / "two", [("optimal", 4.5, 0.02, 1, 0.01)]))
    text = cifar10_small.accounting(runs)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    half_width = 4.30265 * 0.1 / 3**0.5  # Student's quantile of three values
    assert lines[::3] == ["| variance | one | two |", "| variance | one | two |"]
    assert lines[2::3] == [
        f"| optimal | 4.100 ± {half_width:.3f} | 4.500 |",
        f"| optimal | +8.2000 ± {2 * half_width:.4f} | +1.0000 |",
    ]
    assert "(Student's t, n = 1 to 3 seeds; one seed has no interval)" in text and "standard error" not in text


def test_a_run_that_was_accounted_for_is_not_scored_again(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(variance_accounting, "run", lambda directory, *_, **__: asked.append(directory.name))
    (tmp_path / "new").mkdir()
    cifar10_small.account(saved(tmp_path / "old", []))
    cifar10_small.account(tmp_path / "new")
    assert asked == ["new"]


@pytest.mark.parametrize("weights", ["aa", "bb"])
def test_a_run_that_went_on_is_accounted_for_again(weights, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(variance_accounting, "run", lambda directory, *_, **__: asked.append(directory.name))
    run = tmp_path / "run"
    run.mkdir()
    (run / f"{variance_accounting.FILE}.csv").write_text("variance,bpd,ema_sha256\noptimal,4.0,aa\n")
    (run / "summary.json").write_text(json.dumps({"ema_sha256": weights}))
    cifar10_small.account(run)
    assert asked == ([] if weights == "aa" else ["run"])


@pytest.mark.parametrize("images", [300, 256])
def test_a_table_of_other_images_is_made_again(images, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(variance_accounting, "run", lambda directory, *_, **__: asked.append(directory.name))
    run = tmp_path / "run"
    run.mkdir()
    head = "variance,bpd,ema_sha256,images,train_images"
    (run / f"{variance_accounting.FILE}.csv").write_text(f"{head}\noptimal,4.0,aa,{images},64\n")
    (run / "summary.json").write_text(json.dumps({"ema_sha256": "aa"}))
    cifar10_small.account(run)
    assert asked == ([] if images == 300 else ["run"])
