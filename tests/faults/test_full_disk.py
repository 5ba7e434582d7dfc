"""A disk without room for a checkpoint: the error is one line, also in multi-process runs."""

import asyncio
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import toy

from diffusion.reporting.metrics_log import read_metrics
from diffusion.runtime import orbax_noise
from diffusion.training import loop

ROOT = Path(__file__).resolve().parents[2]
# Hundreds of leaves, most of which are still being written when the first one fails.
SAVE_WITHOUT_ROOM = """
import resource, sys
import numpy as np
from diffusion.runtime import orbax_noise
from diffusion.runtime.checkpoint import Checkpoints

orbax_noise.silence()
state = {f"leaf_{i}": np.random.default_rng(i).normal(size=400) for i in range(300)}
with Checkpoints(sys.argv[1]) as checkpoints:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    for step in range(1, 6):
        try:
            checkpoints.save(step, state, {})
            checkpoints.wait()
        except OSError as error:
            print(error)
"""


def test_a_failed_save_prints_nothing_of_its_own(tmp_path):
    command = [sys.executable, "-c", SAVE_WITHOUT_ROOM, str(tmp_path / "checkpoints")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)  # through pipes: they have no limit
    assert result.returncode == 0 and result.stderr == "", result.stderr
    errors = result.stdout.splitlines()
    assert errors[0].startswith("the checkpoint of step 1 could not be written to ")
    assert all("could not be written" in line for line in errors)


def test_importing_the_package_changes_no_logger_and_no_hook():
    ask = (
        "import logging, sys\n"
        "from diffusion.programs import train, evaluate\n"
        "filters = [logging.getLogger(name).filters for name in ('absl', 'asyncio')]\n"
        "print(sys.unraisablehook is sys.__unraisablehook__, *filters)"
    )
    result = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "True [] []\n", result.stderr


def test_only_writes_that_outlive_their_save_are_kept_silent():
    shown = []
    hook = orbax_noise._without_late_writes(shown.append)
    closed = asyncio.new_event_loop()
    closed.close()
    with pytest.raises(RuntimeError) as late:  # what TensorStore does for each of them
        closed.call_soon_threadsafe(print)
    hook(SimpleNamespace(object=None, exc_value=late.value))
    assert shown == []
    others = [
        SimpleNamespace(object=None, exc_value=RuntimeError("another one")),
        SimpleNamespace(object=None, exc_value=None),
        SimpleNamespace(object=print, exc_value=late.value),  # somebody's own callback
    ]
    for other in others:
        hook(other)
    assert shown == others


def test_of_tensorstore_s_long_messages_what_the_disk_said_is_told():
    """It comes last, after paths of several lines."""
    begin = f'UNKNOWN: Error writing "opt_state.1.0.mu/0" in OCDBT database at local file "{"/long" * 50}": Failed to '
    spec = "[tensorstore_spec='{\\\"driver\\\":\\\"zarr\\\"}']"
    for number, words in ((5, "Input/output error"), (28, "No space left on device")):
        error = ValueError(f"{begin}open: {words} [os_error_code='{number}'] {spec}")
        assert orbax_noise.reason(error) == words
    assert orbax_noise.reason(OSError(28, "No space", "file")) == "[Errno 28] No space: 'file'"


def test_where_process_0_cannot_save_the_others_stop_too(layer, tmp_path, monkeypatch):
    asked = []

    def on_first(action):
        """As on the other process, which process 0 tells at the second save that the first has failed."""
        asked.append(action)
        if len(asked) == 2:
            raise ValueError("the checkpoint of step 10 could not be written")

    monkeypatch.setattr(loop, "processes", SimpleNamespace(on_first=on_first, is_first=lambda: False))
    with pytest.raises(ValueError, match="the checkpoint of step 10 could not be written"):
        toy.run(toy.experiment(), tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path)] == [5, 10, 15, 20]
