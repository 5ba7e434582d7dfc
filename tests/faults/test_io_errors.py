"""A disk that answers reads with EIO while a run resumes: nothing is moved or begun anew."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import launch
import pytest

SOURCE = Path(__file__).parent / "eio.c"
STEPS = {"train.num_steps": 12}
STOPPED_AT = 8
OF_EVERY_START = ("lock", "seconds.json")  # who is at work, and how long


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """A library that breaks reads where it is preloaded."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the library is for Linux")
    if not (compiler := shutil.which("cc") or shutil.which("gcc")):
        pytest.skip("there is no C compiler to make the library with")
    built = tmp_path_factory.mktemp("eio") / "eio.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", built, SOURCE, "-ldl"], check=True)
    return built


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """A run that was killed after it had saved a checkpoint."""
    directory = tmp_path_factory.mktemp("runs") / "killed"
    running = launch.start(directory, **STEPS)
    launch.until_saved(directory, STOPPED_AT)
    running.kill()
    running.wait()
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    """Every file and folder in `directory`, but for what every start of a run writes."""
    found = {str(path.relative_to(directory)): path for path in directory.rglob("*") if path.name not in OF_EVERY_START}
    return {name: path.read_bytes() if path.is_file() else b"" for name, path in found.items()}


def test_the_library_breaks_the_named_files_only(library, tmp_path):
    for name in ("broken", "sound"):
        (tmp_path / name).write_text(name)
        environment = os.environ | {"LD_PRELOAD": str(library), "EIO_PATH": str(tmp_path / "broken")}
        result = subprocess.run(["cat", tmp_path / name], env=environment, capture_output=True, text=True)
        assert (result.stdout == name) == (result.returncode == 0) == (name == "sound"), result.stderr


@pytest.mark.timeout(900)  # three runs of main.py
def test_a_disk_that_cannot_be_read_stops_the_run_and_costs_nothing(library, killed, tmp_path):
    run = tmp_path / "run"
    launch.cut(killed, run, STOPPED_AT)
    before = contents(run)
    # Every file of the checkpoints; then the arrays alone, which only Orbax reads.
    for part in ("checkpoints/", f"checkpoints/{STOPPED_AT}/state/ocdbt.process_0/"):
        printed_before = len(launch.log(run).read_text()) if launch.log(run).exists() else 0
        broken = {"LD_PRELOAD": str(library), "EIO_PATH": str(run / part)}
        launch.wait(launch.start(run, variables=broken, **STEPS), code=2)
        printed = launch.log(run).read_text()[printed_before:]
        lines = [line for line in printed.splitlines() if line.strip()]
        named = f"error: the checkpoint {run / 'checkpoints' / str(STOPPED_AT)} cannot be read (Input/output error"
        assert lines[-1].startswith(named) and "Traceback" not in printed, printed
        assert contents(run) == before, part
