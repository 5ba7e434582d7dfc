"""Sweeps: which cells there are, and that each is trained and measured once, in processes of its own."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from diffusion.experiment import config as config_lib
from diffusion.experiment import workdir
from diffusion.runtime import preemption
from experiments import cifar10_small, ho2020, results, sweep, variance
from experiments.sweep import Cell

ROOT = Path(__file__).parents[2]
BASE = "configs/digits_fixed.py"
SINGLE = {"prediction": ["eps"], "objective": ["vlb"], "variance": ["learned"], "schedule": ["cosine"]}
TINY = {
    "unet.channels": "4", "unet.channel_mult": "(1,)", "unet.num_res_blocks": "1", "unet.num_groups": "2",
    "unet.attention_resolutions": "()", "unet.fourier_features": "()", "train.batch_size": "16",
    "train.num_steps": "4", "train.checkpoint_every": "2", "train.log_every": "1", "train.sample_every": "0",
    "eval.num_images": "20", "sample.num_images": "4", "quality.num_images": "4",
}  # fmt: skip


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    jax.devices()  # JAX reads the flags at its first use, and these are not for the tests' own process
    # The runs have one device, and compile as the tests do: without optimization.
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    monkeypatch.setenv("XLA_FLAGS", flags)


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


def test_signals_do_after_a_sweep_what_they_did_before(tmp_path, monkeypatch):
    before, during = signal.getsignal(signal.SIGINT), []
    monkeypatch.setattr(sweep, "run_cell", lambda *_: during.append(signal.getsignal(signal.SIGINT)) or "")
    variance.main([f"--workdir={tmp_path}", f"--base={BASE}", "--index=0"])
    assert during == [sweep._stop] and signal.getsignal(signal.SIGINT) is before


def test_a_list_says_how_long_what_is_left_takes_once_it_is_known(tmp_path, monkeypatch):
    cells = sweep.grid(BASE, axes(seed=["0", "1", "2"]), {"train.num_steps": "600", "train.batch_size": "32"})
    assert sweep.expected(cells, tmp_path).startswith("3 cells, 3 to run; how long is known once")
    monkeypatch.setattr(sweep, "_is_done", lambda cell, directory: cell is cells[0])
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

    assert count("--seeds=3") == count("--seed=4,5,6") == 3 * count()


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


STAND_IN = """
import json, pathlib, sys, time
settings = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
folder, mode = pathlib.Path(settings["workdir"]), settings["mode"]
(folder / f"{mode}_starts").open("a").write("x")
if mode == "quality" and (folder / "no_memory").exists():
    sys.exit("error: no memory")
while (folder / "wait").exists():
    time.sleep(0.05)
if mode == "train":
    (folder / "summary.json").write_text("{}")
else:
    num_images = int(settings.get("config.quality.num_images", 1000))
    sampler = {"method": "ancestral", "num_steps": 50, "variance": "learned_range", "seed": 0}
    scores = {"num_samples": num_images, "features": "pixels", "sampler": sampler}
    scores["reference"] = "digits, train split, 1498 images"
    (folder / "quality.json").write_text(json.dumps(scores))
"""


ONE_CELL = """
import functools, pathlib, sys
from experiments import sweep

base, directory = sys.argv[1], pathlib.Path(sys.argv[2])
sweep.MAIN, run_cell = directory / "main.py", sweep.run_cell
sweep.run_cell = lambda cell, folder, watch, *more: run_cell(cell, folder, functools.partial(print, flush=True), *more)
sys.exit(bool(sweep.run_cells([sweep.Cell("cell", base, {})], directory)))
"""


def sweep_of_a_stand_in(tmp_path):
    """A process that sweeps one cell with a program in the place of main.py, which ends once there is no `wait`."""
    (tmp_path / "main.py").write_text(STAND_IN)
    return subprocess.Popen([sys.executable, "-c", ONE_CELL, BASE, str(tmp_path)], stdout=subprocess.PIPE, text=True)


def wait_for(path):
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert path.exists()


def test_a_sweep_that_is_killed_and_started_again_trains_no_cell_twice_at_once(tmp_path):
    """SIGKILL leaves the run behind; the next sweep waits for it, finds it finished and does not start another."""
    (tmp_path / "cell").mkdir()
    (tmp_path / "cell" / "wait").touch()
    killed = sweep_of_a_stand_in(tmp_path)
    wait_for(tmp_path / "cell" / "train_starts")
    killed.kill()
    killed.wait()
    again = sweep_of_a_stand_in(tmp_path)
    assert any("waits for another process" in line for line in again.stdout)
    assert not (tmp_path / "cell" / "summary.json").exists()
    (tmp_path / "cell" / "wait").unlink()
    again.communicate(timeout=60)
    assert again.returncode == 0
    assert (tmp_path / "cell" / "summary.json").exists()
    assert (tmp_path / "cell" / "train_starts").read_text() == "x"
    assert (tmp_path / "cell" / "quality_starts").read_text() == "x"


def test_samples_are_measured_again_where_they_were_not_or_otherwise(tmp_path, monkeypatch):
    """A failure keeps what was trained, and the next sweep does only what is missing."""
    monkeypatch.setattr(sweep, "MAIN", tmp_path / "main.py")
    (tmp_path / "main.py").write_text(STAND_IN)
    folder = tmp_path / "cell"
    folder.mkdir()

    def starts(**overrides):
        cell = Cell("cell", BASE, {key.replace("__", "."): value for key, value in overrides.items()})
        failures = sweep.run_cells([cell], tmp_path)
        return failures, *((folder / f"{mode}_starts").read_text().count("x") for mode in ("train", "quality"))

    (folder / "no_memory").touch()
    failures, *counts = starts()
    assert counts == [1, 1] and failures["cell"].startswith("error: no memory (exit code 1, see ")
    assert (folder / "summary.json").exists()
    (folder / "no_memory").unlink()
    assert starts() == ({}, 1, 2)
    assert starts() == ({}, 1, 2)
    assert starts(quality__num_images="30") == ({}, 1, 3)
    assert starts(quality__num_images="30") == ({}, 1, 3)

    scores = (folder / "quality.json").read_text()
    (folder / "quality.json").unlink()

    def another_sweep_is_faster(words):
        if words == "waits for another process":
            (folder / "quality.json").write_text(scores)

    assert sweep.run_cell(Cell("cell", BASE, {"quality.num_images": "30"}), folder, another_sweep_is_faster) == ""
    assert starts(quality__num_images="30") == ({}, 1, 3)


def test_a_cell_that_was_finished_before_a_key_existed_is_not_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_run", None)  # it would fail
    monkeypatch.setattr(sweep.quality, "is_measured", lambda config, directory: True)
    (cell,) = sweep.grid("configs/digits_fixed.py", axes(), {})
    workdir.claim(cell.config(), tmp_path)
    groups = json.loads((tmp_path / "config.json").read_text())
    del groups["data"]["validation"]
    (tmp_path / "config.json").write_text(json.dumps(groups))
    (tmp_path / "summary.json").write_text("{}")
    assert sweep.run_cell(cell, tmp_path, print) == ""
    (other,) = sweep.grid("configs/digits_fixed.py", axes(), {"data.validation": "100"})
    assert "data.validation: 0 → 100" in sweep.run_cell(other, tmp_path, print)


@pytest.mark.slow
@pytest.mark.timeout(900)  # five runs of main.py
def test_a_sweep_end_to_end(tmp_path, monkeypatch):
    """Two cells: the sweep is killed in the first, goes on when it is started again, and then finds nothing to do."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    settings = [f"{key}={value}" for key, value in TINY.items()]
    command = [sys.executable, "-m", "experiments.variance", f"--workdir={tmp_path / 'sweep'}", "--set", *settings]
    command += ["--objective=vlb", "--variance=fixed_small,learned", "--T=3", "--seed=0"]
    first = tmp_path / "sweep" / "v-vlb-fixed_small-cosine-T3-seed0"
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(first / "metrics.jsonl")
    killed.send_signal(signal.SIGTERM)
    assert killed.wait(30) == preemption.EXIT_CODE and not (first / "summary.json").exists()

    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows, _ = results.rows(results.read(tmp_path / "sweep")[0])
    assert sorted(row.setting["variance"] for row in rows) == ["fixed_small", "learned"]
    assert (first / "log.txt").read_text().count("$ ") == 3  # it was started, resumed and measured
    assert all(row.distance_kind == ("Fréchet distance (pixels)", "pixels", 4, "") for row in rows)
    assert all(row.distances[0] > 0 for row in rows)
    assert (tmp_path / "sweep" / "quality.png").exists()
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert "The plot quality.png" in page and "lowest Fréchet distance (pixels)" in page
    assert "## Paired differences" in result.stdout

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").glob("*/*")}
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").glob("*/*")}
