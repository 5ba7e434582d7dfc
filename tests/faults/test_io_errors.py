"""A disk that answers reads with EIO while a run resumes: nothing is moved or started again."""

import os
import subprocess
import sys
from pathlib import Path

import faulty_disk
import jax
import launch
import numpy as np
import pytest

from diffusion.experiment import build, workdir
from diffusion.experiment import config as config_lib
from diffusion.runtime.checkpoint import Checkpoints

CONFIG = str(Path(__file__).parent / "digits_layer.py")
STEPS = {"train.num_steps": 12}
STOPPED_AT = 8
OF_EVERY_START = ("lock", "seconds.json")  # who is at work, and how long


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """A library that breaks reads where it is preloaded."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the library is for Linux")
    try:
        return faulty_disk.library(tmp_path_factory.mktemp("library"))
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture
def stopped(tmp_path, tiny_data_dir) -> Path:
    """A run of main.py that was stopped after a checkpoint. The network was not trained, which no reader asks."""
    directory = tmp_path / "run"
    keys = launch.TINY | STEPS | {"data.data_dir": tiny_data_dir}
    config = config_lib.from_file(CONFIG, {key: str(value) for key, value in keys.items()})
    workdir.claim(config, directory)
    workdir.save_base(directory, CONFIG)
    state = jax.device_get(build.experiment(config, (8, 8, 1), 17).initial_state())
    with Checkpoints(directory / "checkpoints") as checkpoints:
        checkpoints.save(STOPPED_AT, state.replace(step=np.int32(STOPPED_AT)), {"val_loss": 1.0})
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    """Every file and folder in `directory`, but for what every start of a run writes."""
    found = {str(path.relative_to(directory)): path for path in directory.rglob("*") if path.name not in OF_EVERY_START}
    return {name: path.read_bytes() if path.is_file() else b"" for name, path in found.items()}


def test_the_library_breaks_the_named_files_only(library, tmp_path):
    for name in ("broken", "sound"):
        (tmp_path / name).write_text(name)
        environment = os.environ | {"LD_PRELOAD": str(library), "FAULTY_PATH": str(tmp_path / "broken")}
        result = subprocess.run(["cat", tmp_path / name], env=environment, capture_output=True, text=True)
        assert (result.stdout == name) == (result.returncode == 0) == (name == "sound"), result.stderr


def test_a_disk_that_cannot_be_read_stops_the_run_and_costs_nothing(library, stopped, tiny_data_dir):
    before, keys = contents(stopped), STEPS | {"data.data_dir": tiny_data_dir}
    # Every file of the checkpoints; then the arrays alone, which only Orbax reads.
    for part in ("checkpoints/", f"checkpoints/{STOPPED_AT}/state/"):
        printed_before = len(launch.log(stopped).read_text()) if launch.log(stopped).exists() else 0
        broken = {"LD_PRELOAD": str(library), "FAULTY_PATH": str(stopped / part)}
        launch.wait(launch.start(stopped, config=CONFIG, variables=broken, **keys), code=2)
        printed = launch.log(stopped).read_text()[printed_before:]
        lines = [line for line in printed.splitlines() if line.strip()]
        named = f"error: the checkpoint {stopped / 'checkpoints' / str(STOPPED_AT)} cannot be read (Input/output error"
        assert lines[-1].startswith(named) and "Traceback" not in printed, printed
        assert contents(stopped) == before, part
