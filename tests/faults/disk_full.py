"""The disk is full when a checkpoint is written: the run reports it, and the previous checkpoint is undamaged.

    python tests/faults/disk_full.py

A run of main.py on the digits is stopped after its first checkpoint. It continues under a limit on the size of files,
which its next checkpoint exceeds, and then without the limit. It must end like a run that was never stopped.
"""

import signal
import tempfile
from pathlib import Path

import launch


def main(root: Path) -> None:
    """Prints what the run says, and whether it ends where it would have ended."""
    launch.wait(launch.start(root / "straight"))
    running = launch.start(root / "run")
    launch.until_saved(root / "run", 4)
    running.send_signal(signal.SIGTERM)
    launch.wait(running, code=75)
    saved = [path.name for path in (root / "run" / "checkpoints").glob("[0-9]*")]
    num_bytes, printed_before = launch.half_a_checkpoint(root / "run"), launch.log(root / "run").stat().st_size
    limited = launch.start(root / "run")
    launch.limit_files(limited, num_bytes)
    launch.wait(limited, code=2)
    printed = launch.log(root / "run").read_text()[printed_before:]
    message = printed.strip().splitlines()[-1]
    print(f"file sizes limited to {num_bytes:,} bytes: {message}")
    assert message.startswith("error: the checkpoint of step ") and "could not be written" in message
    assert "Traceback" not in printed, printed
    assert all((root / "run" / "checkpoints" / step).exists() for step in saved)
    launch.wait(launch.start(root / "run"))
    assert launch.end(root / "run") == launch.end(root / "straight")
    print("then, without the limit: the end is bit-identical to that of a run that was never stopped")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
