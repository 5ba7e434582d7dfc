"""Runs whose output nobody reads: `2>&1 | head -1`, `2>&-`, and no standard stream at all.

    python tests/faults/no_reader.py

Each trains, samples and scores. It must exit with 0 and end like a run whose output goes to a file.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import launch

CONFIG = "tests/faults/digits_layer.py"
OUTPUTS = {"2>&1 | head -1": "2>&1 | head -1 > /dev/null", "2>&-": "2>&- > /dev/null", "<&- >&- 2>&-": "<&- >&- 2>&-"}


def main(root: Path) -> None:
    """Prints how many runs ended where they should."""
    launch.wait(launch.start(root / "straight", config=CONFIG))
    for number, output in enumerate(OUTPUTS.values()):
        run = root / f"run_{number}"
        keys = [f"--config.{key}={value}" for key, value in launch.TINY.items()]
        command = f'"$0" main.py "$@" {output}; exit ${{PIPESTATUS[0]}}'
        shell = ["bash", "-c", command, sys.executable, f"--config={CONFIG}", f"--workdir={run}", *keys]
        code = subprocess.run(shell, cwd=launch.ROOT, env=launch.environment(1), timeout=900).returncode
        assert code == 0, f"{output}: exit code {code}"
        assert launch.end(run) == launch.end(root / "straight"), output
    print(f"{len(OUTPUTS)} runs without a reader ({', '.join(OUTPUTS)}): bit-identical ends")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
