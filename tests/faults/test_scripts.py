"""The scripts of this folder at a small size: each prints its number."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("kills.py 3", "3 bit-identical ends"),
        ("kills.py 2 --signal=TERM --load=2", "2 bit-identical ends"),
        ("kills.py 5 --toy", "5 bit-identical ends"),
        ("several_processes.py", "both refused it"),
        ("several_processes.py --toy", "both refused it"),
        ("decoding.py 10", "one decoding, the same bytes"),
        ("no_reader.py", "3 runs without a reader"),
        ("every_io.py --number=2", "after each fault the same command ends with the same bits"),
        ("disk_full.py", "then, without the limit: the end is bit-identical"),
    ],
)
def test_script(command, words):
    name, *flags = command.split()
    result = subprocess.run([sys.executable, str(HERE / name), *flags], capture_output=True, text=True)
    assert result.returncode == 0 and words in result.stdout, result.stdout + result.stderr
