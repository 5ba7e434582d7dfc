"""docs/extending.md: every diff touches only the files that its row names, applies, and runs."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
DIFFS = dict(re.findall(r"^## (.+?)\n.*?```diff\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))
# Section -> the files that its row of the table names.
TOUCHED = {
    "A loss": {"diffusion/objectives.py"},
    "A weighting": {"diffusion/objectives.py"},
    "A schedule": {"diffusion/schedules.py"},
    "A prediction, a variance": {"diffusion/reverse.py"},
    "A sampler": {"diffusion/samplers.py"},
    "A network": {"diffusion/networks/__init__.py", "diffusion/networks/mlp.py"},
    "A metric of samples": {"diffusion/evaluation/quality.py"},
    "A logger": {"diffusion/reporting/loggers.py"},
    "A data set": {"diffusion/data/bars.py"},
}


@pytest.fixture
def copy(tmp_path):
    """The project's code, without its history."""
    for name in ("configs", "diffusion"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "main.py", tmp_path)
    return tmp_path


def apply(diff: str, directory: Path) -> None:
    # Outside of a repository, or Git would look for its paths in the one around it.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(directory.parent)}
    command = ["git", "apply", "--whitespace=nowarn", "-"]
    result = subprocess.run(command, input=diff, text=True, cwd=directory, env=environment, capture_output=True)
    assert result.returncode == 0, result.stderr


def test_each_row_of_the_table_has_its_diff():
    assert DIFFS.keys() == TOUCHED.keys()


@pytest.mark.parametrize("section", TOUCHED)
def test_a_diff_touches_only_the_files_of_its_row_and_applies(section, copy):
    touched = set(re.findall(r"^\+\+\+ b/(.+)$", DIFFS[section], re.MULTILINE))
    assert touched == TOUCHED[section]
    before = {name: (copy / name).read_text() for name in touched if (copy / name).exists()}
    apply(DIFFS[section], copy)
    for name in touched:
        assert (copy / name).read_text() != before.get(name, "")


def test_all_of_them_together_run_as_the_page_says(copy):
    """Each new name is used, so each diff does something: trained, scored, sampled and compared with the data."""
    for diff in DIFFS.values():
        apply(diff, copy)
    (command,) = re.findall(r"```\n(python main\.py .*?)```", PAGE, re.DOTALL)
    command = [sys.executable, *shlex.split(command.replace("\\\n", " "))[1:]]
    small = ["train.num_steps=3", "train.sample_every=0", "eval.num_images=16", "quality.num_images=16"]
    command += [f"--config.{setting}" for setting in small]
    environment = os.environ | {"TFDS_DATA_DIR": str(copy / "data"), "PYTHONPATH": str(copy)}
    for mode in ("train", "quality"):
        result = subprocess.run([*command, f"--mode={mode}"], cwd=copy, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    run = copy / "runs" / "extended"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["protocol"]["variance"] == "fixed_middle"
    assert summary["protocol"]["schedule"] == "sigmoid(end=2.5)"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "mae" in rows[-1]
    assert f"{rows[-1]['step']},mae,{rows[-1]['mae']:.4g}" in (run / "metrics.csv").read_text().splitlines()
    quality = json.loads((run / "quality.json").read_text())
    assert quality["sampler"]["method"] == "tempered(temperature=0.8)"
    assert quality["distance_of_means"] > 0 and quality["reference"].startswith("bars")
    page = (run / "report.html").read_text()  # that of the last program: it knows the config file and the new metric
    assert "Keys that differ from configs/digits.py" in page and "distance_of_means" in page
