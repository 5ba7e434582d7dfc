"""The command line of a study: errors are one line, and name the flag."""

from types import SimpleNamespace

import pytest

from experiments import guidance, learned_schedule, parameterizations, steps, sweep
from experiments.commands import argument_parser, numbers


@pytest.mark.parametrize("arguments", [[], ["x", "--pick=best"], ["x", "--fulll"], ["x", "--terms=few"]])
def test_a_wrong_command_line_is_one_line(arguments, capsys):
    parser = argument_parser("A study.")
    parser.add_argument("weights")
    parser.add_argument("--pick", choices=("first", "last"))
    parser.add_argument("--terms", type=int)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(arguments)
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert arguments[-1:] == [] or arguments[-1].split("=")[0] in printed


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("5,ten", int, "--steps: 'ten' is not an integer ≥ 1"),
        ("5,,10", int, "--steps: '' is not an integer ≥ 1"),
        ("0,5", int, "--steps: '0' is not an integer ≥ 1"),
        ("5,nan", float, "--steps: 'nan' is not a number ≥ 1"),
        ("5,inf", float, "--steps: 'inf' is not a number ≥ 1"),
        ("5,10,5", int, "--steps=5,10,5 names 5 twice"),
    ],
)
def test_a_list_of_numbers_is_refused_with_its_flag(text, kind, words):
    with pytest.raises(ValueError, match=f"^{words}$"):
        numbers(text, "--steps", kind, least=1)
    assert numbers("5, 10", "--steps", kind, least=1) == [5, 10]


@pytest.mark.parametrize(
    ("study", "flags", "words"),
    [
        (guidance, ["--weights=0,much"], "--weights: 'much' is not a number"),
        (guidance, ["--weights=-2"], "--weights: sample.guidance must be a number in"),
        (guidance, ["--weights=-1"], "--weights: -1 is always drawn"),
        (steps, ["--steps=5,5"], "--steps=5,5 names 5 twice"),
        (steps, ["--num_scored=1"], "--num_scored=1 must be at least 2"),
        (learned_schedule, ["--seeds=0,0"], "--seeds=0,0 names 0 twice"),
        (learned_schedule, ["--seeds=0,-1"], "--seeds: '-1' is not an integer ≥ 0"),
    ],
)
def test_a_study_reads_its_flags_before_it_loads_or_makes_anything(study, flags, words, tmp_path, monkeypatch):
    directory = tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["study", f"--workdir={directory}", *flags])
    with pytest.raises(ValueError, match=words):
        study.main()
    assert not directory.exists()


def test_an_arm_that_cannot_be_trained_is_refused_before_another_is_trained(tmp_path, monkeypatch):
    images = SimpleNamespace(image_shape=(8, 8, 1), num_levels=17)
    monkeypatch.setattr(learned_schedule.build, "load_splits", lambda config: SimpleNamespace(test=images))
    monkeypatch.setattr(learned_schedule, "train", None)
    with pytest.raises(ValueError, match="schedule.num_steps=1 must be at least 2"):  # of the second arm
        learned_schedule.run(tmp_path / "new", num_steps=1, train_steps=10, seeds=[0])
    assert not (tmp_path / "new").exists()


def test_a_network_that_does_not_exist_is_refused_before_the_runs_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "execute", None)
    with pytest.raises(FileNotFoundError, match="none"):
        parameterizations.main([f"--workdir={tmp_path / 'runs'}", f"--network={tmp_path / 'none'}"])
