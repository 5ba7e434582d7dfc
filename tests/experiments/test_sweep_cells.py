"""The cells of a sweep: each is trained and measured once, in separate processes, even if the sweep is stopped."""

import json
import signal
import subprocess
import sys
import time

import pytest
from sweep_runs import AXES, BASE

from diffusion.experiment import workdir
from diffusion.runtime import preemption
from experiments import results, sweep
from experiments.sweep import Cell

pytestmark = pytest.mark.usefixtures("from_the_root")
ONE = AXES | {"variance": ["fixed_small"], "seed": ["0"]}
TINY = {
    "unet.channels": "4", "unet.channel_mult": "(1,)", "unet.num_res_blocks": "1", "unet.num_groups": "2",
    "unet.attention_resolutions": "()", "unet.fourier_features": "()", "train.batch_size": "16",
    "train.num_steps": "4", "train.checkpoint_every": "2", "train.log_every": "1", "train.sample_every": "0",
    "eval.num_images": "20", "sample.num_images": "4", "quality.num_images": "4",
}  # fmt: skip

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
    (cell,) = sweep.grid(BASE, ONE, {})
    workdir.claim(cell.config(), tmp_path)
    groups = json.loads((tmp_path / "config.json").read_text())
    del groups["data"]["validation"]
    (tmp_path / "config.json").write_text(json.dumps(groups))
    (tmp_path / "summary.json").write_text("{}")
    assert sweep.run_cell(cell, tmp_path, print) == ""
    (other,) = sweep.grid(BASE, ONE, {"data.validation": "100"})
    assert "data.validation: 0 → 100" in sweep.run_cell(other, tmp_path, print)


def test_a_finished_cell_keeps_the_settings_that_it_was_scored_with(tmp_path, monkeypatch):
    """Its summary.json stays, so another eval.protocol in its config.json would describe scores that nobody made."""
    monkeypatch.setattr(sweep, "_run", lambda *_: 0)
    own = {"optim.decay": "constant"}

    def run(watch=print, **keys):
        cell = Cell("cell", BASE, own | {key.replace("__", "."): value for key, value in keys.items()})
        return sweep.run_cell(cell, tmp_path, watch)

    workdir.claim(Cell("cell", BASE, own).config(), tmp_path)
    before = (tmp_path / "config.json").read_text()

    def another_sweep_finishes_it(words):
        (tmp_path / "summary.json").write_text("{}")

    for watch, is_measured in ((another_sweep_finishes_it, False), (print, False), (print, True)):
        monkeypatch.setattr(sweep.quality, "is_measured", lambda *_, answer=is_measured: answer)
        failure = run(watch, eval__terms_per_image="9")
        assert "was scored with other values (eval.terms_per_image: 0 → 9); give those values again" in failure
        assert (tmp_path / "config.json").read_text() == before
    assert run(eval__batch_size="7") == ""
    assert run(eval__terms_per_image="9", train__num_steps="2000") == "", "it is scored again at its new end"


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
    assert all(row.distance_kind[:5] == ("Fréchet distance (pixels)", "pixels", 4, "", "") for row in rows)
    assert all(row.distances[0] > 0 for row in rows)
    assert (tmp_path / "sweep" / "quality.png").exists()
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert "The plot quality.png" in page and "lowest Fréchet distance (pixels)" in page
    assert "## Paired differences" in result.stdout

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").glob("*/*")}
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").glob("*/*")}
