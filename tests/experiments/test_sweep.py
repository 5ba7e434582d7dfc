"""Sweeps: their cells, and the messages of the command line."""

import io
import json
import signal
import sys

import pytest

from diffusion.experiment import config as config_lib
from diffusion.experiment import workdir
from experiments import cifar10_small, ho2020, sweep, variance
from experiments.sweep import Cell

BASE = "configs/digits_fixed.py"
pytestmark = pytest.mark.usefixtures("from_the_root")
SINGLE = {"prediction": ["eps"], "objective": ["vlb"], "variance": ["learned"], "schedule": ["cosine"]}


def axes(**values):
    return SINGLE | {"T": ["4"], "seed": ["0"]} | values


def test_a_grid_is_the_product_of_its_axes_and_each_cell_says_so():
    cells = sweep.grid(BASE, axes(T=["4", "8"], seed=["0", "1", "0"]), {"optim.grad_clip": "2"})
    assert [cell.name for cell in cells] == [
        f"eps-vlb-learned-cosine-T{num_steps}-seed{seed}" for num_steps in (4, 8) for seed in (0, 1)
    ]
    config = cells[3].config()
    assert (config.schedule.num_steps, config.seed, config.model.variance) == (8, 1, "learned")
    assert config.optim.grad_clip == 2.0 and config.optim.learning_rate == 2e-3


def test_names_with_arguments_make_plain_folders():
    schedules = sweep.split_values("cosine,linear(beta_start=1e-4, beta_end=0.03),learned(start='cosine(offset=0.01)')")
    assert schedules == ["cosine", "linear(beta_start=1e-4, beta_end=0.03)", "learned(start='cosine(offset=0.01)')"]
    cells = sweep.grid(BASE, axes(variance=["fixed_small"], T=["50"], schedule=schedules), {})
    assert [cell.name for cell in cells] == [
        f"eps-vlb-fixed_small-{schedule}-T50-seed0"
        for schedule in (
            "cosine",
            "linear_beta_start_1e-4_beta_end_0.03",
            "learned_start_cosine_offset_0.01",
        )
    ]
    kept, excluded = sweep.possible(cells)
    assert kept == cells and not excluded
    assert [cell.config().schedule.name for cell in cells] == schedules


def test_any_config_key_can_be_an_axis_and_the_seed_stays_the_fastest():
    further = sweep.further_axes(["optim.grad_clip=0,1.5", "schedule.name=cosine,linear(beta_end=0.03)"])
    assert further == {"optim.grad_clip": ["0", "1.5"], "schedule": ["cosine", "linear(beta_end=0.03)"]}
    cells = sweep.grid(BASE, axes(seed=["0", "1"]) | {"optim.grad_clip": ["0", "1.5"]}, {})
    assert [cell.name for cell in cells] == [
        f"eps-vlb-learned-cosine-T4-optim.grad_clip_{clip}-seed{seed}" for clip in ("0", "1.5") for seed in (0, 1)
    ]
    config = cells[2].config()
    assert (config.optim.grad_clip, config.seed) == (1.5, 0)
    with pytest.raises(ValueError, match="optim.grad_clip=2 is an axis of the grid; use --axis optim.grad_clip=2"):
        sweep.grid(BASE, axes() | {"optim.grad_clip": ["1"]}, {"optim.grad_clip": "2"})
    for text in ("optim.grad_clip", "optim.grad_clip=", "seed=1,2"):
        with pytest.raises(ValueError, match="must be KEY=A,B"):
            sweep.further_axes([text])
    with pytest.raises(ValueError, match="did you mean optim.grad_clip"):
        sweep.possible(sweep.grid(BASE, axes() | {"optim.grad_clop": ["1"]}, {}))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--axis", "optim.grad_clip=0", "--axis", "optim.grad_clip=1"], "--axis optim.grad_clip is given twice"),
        (["--variance=learned", "--axis", "model.variance=fixed_small"], "--variance and --axis model.variance are"),
    ],
)
def test_an_axis_that_is_given_twice_is_refused(flags, words):
    with pytest.raises(ValueError, match=words):
        sweep.main(["--workdir=none", "--list", *flags])


def test_signals_do_after_a_sweep_what_they_did_before(tmp_path, monkeypatch):
    before, during = signal.getsignal(signal.SIGINT), []
    monkeypatch.setattr(sweep, "run_cell", lambda *_: during.append(signal.getsignal(signal.SIGINT)) or "")
    variance.main([f"--workdir={tmp_path}", f"--base={BASE}", "--index=0"])
    assert during == [sweep._stop] and signal.getsignal(signal.SIGINT) is before


def test_a_list_says_how_long_what_is_left_takes_once_it_is_known(tmp_path, monkeypatch):
    cells = sweep.grid(BASE, axes(seed=["0", "1", "2"]), {"train.num_steps": "600", "train.batch_size": "32"})
    assert sweep.expected(cells, tmp_path).startswith("3 cells, 3 to run; the time is known once")
    monkeypatch.setattr(sweep, "is_done", lambda cell, directory: cell is cells[0])
    (tmp_path / cells[0].name).mkdir()
    rows = [{"step": step, "images_per_second": speed} for step, speed in ((25, 1.0), (50, 310.0), (75, 330.0))]
    (tmp_path / cells[0].name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = sweep.expected(cells, tmp_path)  # 2 · 600 · 32 images at 320 per second
    assert words.startswith("3 cells, 2 to run: about 2 minutes of training")


def test_two_cells_never_share_a_folder():
    alike = ["linear(beta_end=0.03)", "linear(beta_end = 0.03)"]
    with pytest.raises(ValueError, match="two cells of the sweep would share the folder eps-vlb-learned-linear_"):
        sweep.grid(BASE, axes(schedule=alike), {})


def test_the_name_of_a_folder_is_one_that_file_systems_take_and_two_long_ones_differ():
    long = {"init_from": [f"/{300 * letter}" for letter in "ab"] + [f"/{300 * 'a'}b"]}
    names = [cell.name for cell in sweep.grid(BASE, axes(seed=["0", "1"]) | long, {})]
    assert len(set(names)) == 6 and max(len(name.encode()) for name in names) == 255


def test_exactly_the_pairs_that_cannot_be_trained_are_left_out():
    cells = sweep.grid(BASE, axes(**variance.DEFAULT_AXES), {})
    kept, excluded = sweep.possible(cells)
    fixed, learned = {"fixed_small", "fixed_large"}, {"learned", "learned_range"}
    pairs = {(cell.overrides["objective.name"], cell.overrides["model.variance"]) for cell in kept}
    assert pairs == {("simple", v) for v in fixed} | {("hybrid", v) for v in learned} | {
        ("vlb", v) for v in fixed | learned
    }
    assert len(kept) == 24 and len(kept) + sum(map(len, excluded.values())) == len(cells)
    for cell in kept:
        config_lib.check(cell.config())
    assert all("objective.name" in reason for reason in excluded)


@pytest.mark.parametrize(
    ("changes", "extra", "words"),
    [
        ({"objective": ["vbl"]}, {}, "objective.name must be one of simple, vlb"),
        ({"T": ["many"]}, {}, "schedule.num_steps=many"),
        ({}, {"train.nun_steps": "3"}, "did you mean train.num_steps"),
        ({}, {"seed": "3"}, "use --seed=3"),
        ({}, {"eval.num_images": "-1"}, "eval.num_images=-1 scores no image, and a sweep compares scores"),
        ({"objective": ["simple"]}, {}, "no cell of the sweep is possible: objective.name='simple'"),
    ],
)
def test_a_mistake_is_no_gap_in_the_grid(changes, extra, words):
    with pytest.raises(ValueError, match=words):
        sweep.possible(sweep.grid(BASE, axes(**changes), extra))


def listed(capsys, *arguments):
    assert variance.main(["--workdir=none", "--list", *arguments]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if not line.startswith("left out")]
    return {int(index): name for index, name in lines}


def test_indices_are_stable_contiguous_and_run_disjoint_cells(capsys, monkeypatch):
    names = listed(capsys)
    assert list(names) == list(range(24)) and len(set(names.values())) == 24
    assert listed(capsys) == names
    ran = []
    monkeypatch.setattr(sweep, "run_cells", lambda cells, directory: ran.extend(cell.name for cell in cells) or {})
    for index in (0, 9, 23):
        assert variance.main(["--workdir=none", f"--index={index}"]) == 0
    assert ran == [names[index] for index in (0, 9, 23)]
    with pytest.raises(ValueError, match="--index=24 must be in 0…23"):
        variance.main(["--workdir=none", "--index=24"])


def test_seeds_repeat_every_setting_and_keep_the_folders_of_before(capsys):
    """A sweep that has run one seed runs the others only: the names of its cells stay."""
    one = listed(capsys, "--objective=vlb", "--seed=0")
    three = listed(capsys, "--objective=vlb", "--seeds=3")
    assert list(one.values()) == [name for name in three.values() if name.endswith("-seed0")]
    assert list(three.values())[:3] == [f"v-vlb-fixed_small-cosine-T50-seed{seed}" for seed in range(3)]
    names = [cell.name for cell in cifar10_small.cells({}, ["0", "1"])]
    assert names[:3] == ["simple-fixed_small", "simple-fixed_small-seed1", "simple-fixed_large"]
    assert [cell.config().seed for cell in cifar10_small.cells({}, ["0", "1"])] == 5 * [0, 1]


@pytest.mark.parametrize("program", [sweep, ho2020, cifar10_small])
def test_every_sweep_takes_seeds(program, capsys):
    def count(*flags):
        assert program.main(["--workdir=none", "--list", *flags]) == 0
        return len(capsys.readouterr().out.splitlines())

    assert count("--seeds=3") == count("--seed=4,5,6") == count("--seed=4,4,5,6") == 3 * count()


@pytest.mark.parametrize(
    ("flags", "words"), [(["--seeds=0"], "--seeds=0 must be at least 1"), (["--set", "seed=3"], "use --seed=3")]
)
def test_seeds_that_make_no_sense_are_refused(flags, words):
    with pytest.raises(ValueError, match=words):
        sweep.main(["--workdir=none", "--list", *flags])


def test_the_first_setting_is_what_the_others_are_compared_with(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(sweep.sweep_report, "write", lambda directory, target_of, order: asked.extend(order) or "")
    sweep.main([f"--workdir={tmp_path}", "--report", "--variance=learned,fixed_small", "--seeds=2"])
    rows = ("learned-cosine-T50", "fixed_small-cosine-T50")
    assert asked == [f"v-vlb-{row}-seed{seed}" for row in rows for seed in (0, 1)]


def test_a_report_says_nothing_of_combinations_that_cannot_be_trained(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(sweep.sweep_report, "write", lambda directory, target_of, order: asked.extend(order) or "")
    variance.main([f"--workdir={tmp_path}", "--report", "--objective=simple", "--variance=fixed_small,learned"])
    assert asked == [f"v-simple-fixed_small-cosine-T50-seed{seed}" for seed in range(3)]
    assert "left out v-simple-learned-cosine-T50-seed0, " in capsys.readouterr().out


def test_the_reasons_are_printed_if_every_cell_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sweep, "run_cells", lambda cells, directory: {cell.name: "no memory" for cell in cells})
    assert sweep.main([f"--workdir={tmp_path}"]) == 1
    no_report, reason = capsys.readouterr().err.splitlines()
    assert no_report == f"no report: no run in {tmp_path} is finished (0 are not)"
    assert reason == "failed: v-vlb-learned_range-cosine-T50-seed0: no memory"
    with pytest.raises(FileNotFoundError, match="no run in .* is finished"):
        sweep.main([f"--workdir={tmp_path}", "--report"])


def test_every_published_row_can_be_run_at_both_scales(capsys):
    for scale, count in (("full", 12), ("digits", 11)):  # on digits two of the rows are the same run
        assert ho2020.main(["--workdir=none", f"--scale={scale}", "--list"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == count and not any("left out" in line for line in lines)


def test_one_failure_leaves_the_others_alone(tmp_path, monkeypatch):
    """The first cell names a data set that does not exist, the second lies in a foreign folder."""
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "samples.png").write_text("mine")
    cells = [Cell("nowhere", BASE, {"data.name": "nowhere"}), Cell("foreign", BASE, {}), Cell("third", BASE, {})]
    run_cell = sweep.run_cell
    ran = []
    monkeypatch.setattr(
        sweep, "run_cell", lambda cell, *rest: ran.append(cell.name) if cell.name == "third" else run_cell(cell, *rest)
    )
    failures = sweep.run_cells(cells, tmp_path)
    assert list(failures) == ["nowhere", "foreign"] and ran == ["third"]
    assert "data.name='nowhere'" in failures["nowhere"] and "exit code 2" in failures["nowhere"]
    assert "data.name='nowhere'" in (tmp_path / "nowhere" / "log.txt").read_text()
    assert "samples.png, which a run would overwrite" in failures["foreign"]
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["samples.png"]


@pytest.mark.parametrize("text", ["{", '{"objective": {"vlb_wait": 1}}'])
def test_a_config_that_cannot_be_read_fails_its_own_cell_alone(tmp_path, monkeypatch, text):
    """One is damaged; the other has a key that this version does not have."""
    cells = [Cell("unreadable", BASE, {}), Cell("second", BASE, {})]
    for cell in cells:
        workdir.claim(cell.config(), tmp_path / cell.name)
    (tmp_path / "unreadable" / "config.json").write_text(text)
    (tmp_path / "unreadable" / "summary.json").write_text("{}")
    monkeypatch.setattr(sweep, "_run", lambda cell, *_: ran.append(cell.name) or 0)
    ran = []
    failures = sweep.run_cells(cells, tmp_path, with_quality=False)
    assert ran == ["second"] and list(failures) == ["unreadable"]
    assert failures["unreadable"].startswith(f"{tmp_path / 'unreadable' / 'config.json'} ")


def test_failures_come_after_the_table_in_a_file_of_both(monkeypatch):
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(file)))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(file, write_through=True))
    print("the table")
    assert sweep.exit_code({"cell": "no room"}) == 1 and sweep.exit_code({}) == 0
    assert file.getvalue() == b"the table\nfailed: cell: no room\n"
