"""The study of single changes: its runs, and the differences between them."""

import csv
from pathlib import Path

import numpy as np
import pytest
from sweep_runs import write_run

from diffusion.experiment import config as config_lib
from experiments import changes, sweep_report
from experiments.results import FinishedRun

BASE = str(Path(__file__).parents[2] / "configs" / "digits_fixed.py")
CHANGES = {"model.prediction": "eps", "objective.timesteps": "uniform", "optim.grad_clip": "0.0"}


def test_every_change_has_a_run_with_it_alone_and_one_with_all_others():
    found = {cell.name: cell.overrides for cell in changes.cells(BASE, CHANGES, ["0", "1"], {"train.num_steps": "9"})}
    assert len(found) == 2 * (1 + 3 + 3 + 1)
    of_all = {"seed": "1", "train.num_steps": "9"}
    assert found["none-seed1"] == of_all
    assert found["only-model.prediction-seed1"] == of_all | {"model.prediction": "eps"}
    both = {"model.prediction": "eps", "objective.timesteps": "uniform"}
    assert found["without-optim.grad_clip-seed1"] == of_all | both
    assert found["all-seed1"] == of_all | CHANGES


def test_one_change_needs_two_settings():
    assert {cell.name for cell in changes.cells(BASE, {"ema.decay": "0.9"}, ["0"], {})} == {
        "none-seed0", "only-ema.decay-seed0"
    }  # fmt: skip


def test_of_two_changes_all_but_one_is_the_other_alone():
    two = dict(list(CHANGES.items())[:2])
    found = {cell.name: cell.overrides for cell in changes.cells(BASE, two, ["0"], {})}
    assert list(found) == [f"{name}-seed0" for name in ("none", *(f"only-{key}" for key in two), "all")]
    values = {"none": 4.0, "only-a": 3.75, "only-b": 3.875, "all": 3.25}
    text = changes.report([run(f"{name}-seed0", bpd, "test") for name, bpd in values.items()], dict.fromkeys("ab"), "0")
    assert "| `a=None` | -0.625 |" in text and "| `b=None` | -0.500 |" in text


def finished(directory, cells, bpd=3.0):
    for cell in cells:
        write_run(directory, cell.name, np.array([bpd, bpd]), cell.config())


@pytest.mark.parametrize("is_other", [False, True])
def test_the_second_folder_of_an_earlier_version_counts_where_the_first_is_not_finished(
    monkeypatch, tmp_path, capsys, is_other
):
    """Of two changes, it ran each alone and as all but the other one. A run with another config is not taken."""
    two = {"model.prediction": "eps", "optim.grad_clip": "0.5"}
    none, only, other, both = changes.cells(BASE, two, ["0"], {})
    values = other.overrides | ({"train.num_steps": "9"} if is_other else {})
    finished(tmp_path, [none, only, both])
    finished(tmp_path, [other._replace(name="without-model.prediction-seed0", overrides=values)], 2.5)
    ran = []
    monkeypatch.setattr(changes.sweep, "run_cells", lambda cells, directory: ran.extend(cells) or {})
    arguments = [f"--workdir={tmp_path}", "--seeds=1", *(f"--change={key}={value}" for key, value in two.items())]
    assert changes.main(arguments) == 0
    name = other.name if is_other else "without-model.prediction-seed0"
    assert [cell.name for cell in ran] == [none.name, only.name, name, both.name]
    wanted = "–" if is_other else "-0.500"
    assert f"| `optim.grad_clip=0.5` | {wanted} |" in capsys.readouterr().out


def test_two_folders_of_one_seed_count_once_in_the_table(tmp_path):
    (cell,) = changes.cells(BASE, {}, ["0"], {})
    finished(tmp_path, [cell, cell._replace(name="without-a-seed0")])
    sweep_report.write(tmp_path, lambda run: None)
    with (tmp_path / "table.csv").open() as file:
        assert [row["seeds"] for row in csv.DictReader(file)] == ["1"]


def test_a_key_is_a_change_or_common_to_all_and_changed_once():
    with pytest.raises(ValueError, match="--set ema.decay=0.9 is a change"):
        changes.cells(BASE, {"ema.decay": "0.99"}, ["0"], {"ema.decay": "0.9"})
    with pytest.raises(ValueError, match="names a key twice"):
        changes.main(["--workdir=none", "--change", "ema.decay=0.9", "--change", "ema.decay=0.8"])
    with pytest.raises(ValueError, match="--change ema.decay must be KEY=VALUE"):
        changes.main(["--workdir=none", "--change", "ema.decay"])


def run(name, bpd, split):
    summary = {f"{split}_bpd": bpd, f"{split}_decoder_bpd": bpd / 4, f"{split}_kl_bpd": bpd * 3 / 4}
    return FinishedRun(name, {}, summary, {}, None, None)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_differences_are_taken_seed_by_seed_and_against_all_the_others(split):
    values = {"none": 4.0, "only-a": 3.75, "only-b": 3.875, "without-a": 3.875, "without-b": 3.75, "all": 3.25}
    runs = [run(f"{name}-seed{seed}", bpd + 0.125 * seed, split) for name, bpd in values.items() for seed in (0, 1)]
    text = changes.report(runs, {"a": "1", "b": "2"}, ["0", "1"])
    assert f"of the {split} images" in text and "n = 2 seeds" in text
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    numbers = {(section, line[0].strip("| ")): line[1] for section, line in sections(lines)}
    assert numbers["with", "none of them"].startswith("4.062 ±")
    assert numbers["one change, less none", "`a=1`"] == "-0.250 (all 2 equal)"
    assert numbers["all changes, less all but this one", "`b=2`"] == "-0.500 (all 2 equal)"
    assert numbers["all changes, less all but this one", "`a=1`"] == "-0.625 (all 2 equal)"


def sections(lines):
    """Each line of a table with the table's first heading."""
    section = ""
    for line in lines:
        if line[1] == "bits/dim":
            section = line[0].strip("| ")
        else:
            yield section, line


def test_the_caption_counts_the_seeds_that_are_finished():
    runs = [run("none-seed0", 4.0, "test"), run("none-seed1", 4.1, "test"), run("only-a-seed0", 3.0, "test")]
    text = changes.report(runs, {"a": "1"}, ["0", "1", "2"])
    assert "n = 1 to 2 seeds; one seed has no interval" in text and "n = 3" not in text


def test_a_report_names_only_the_values_that_were_run():
    cells = changes.cells(BASE, {"optim.grad_clip": "0.5"}, ["0"], {})
    ran = [run(cell.name, 4.0, "test") for cell in cells]
    for one, cell in zip(ran, cells, strict=True):
        one.config.update(config_lib.flatten(cell.config()))
    changes.check_values(cells, ran, {"optim.grad_clip": "0.5"})
    others = changes.cells(BASE, {"optim.grad_clip": "2.0"}, ["0"], {})
    with pytest.raises(ValueError, match="only-optim.grad_clip-seed0 was run with optim.grad_clip=0.5, not 2.0"):
        changes.check_values(others, ran, {"optim.grad_clip": "2.0"})
