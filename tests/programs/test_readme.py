"""README.md: its quickstart runs as it stands, and it stays short. Its links: tests/test_docs.py."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_the_quickstart_runs_after_the_demo(untrained_demo):
    directory, environment = untrained_demo
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    numbers = [float(number) for number in re.findall(r"\d+\.?\d*", result.stdout)]
    digit, bits_per_dim = numbers[:64], numbers[64:]
    assert len(bits_per_dim) == 16 and all(0 <= pixel <= 16 for pixel in digit)
    # An untrained model codes a pixel of 17 values worse than log2(17) = 4.09 bits, and not absurdly so.
    assert all(1 < bits < 100 for bits in bits_per_dim)


def test_it_is_at_most_8_kilobytes():
    assert len(README.encode()) <= 8192
