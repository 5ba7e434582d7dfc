"""docs/python.md: its blocks run one after another, as they stand."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "python.md").read_text()


def test_every_block_of_the_page_runs(untrained_demo):
    directory, environment = untrained_demo
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    lines = [
        "assert digits.shape == fast.shape == between.shape == completed.shape == (16, 8, 8, 1)",
        "assert (completed[:, :, :4] == images[:, :, :4]).all() and (completed != images).any()",
        "assert trajectory.shape == (6, 16, 8, 8, 1) and bpd.shape == (16,) and (noise_error > 0).all()",
    ]
    code = code.replace("num_frames=8", "num_frames=6").replace("model.schedule, 10)", "model.schedule, 4)")
    command = [sys.executable, "-c", "\n".join([code, *lines])]
    result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
