"""main.py in processes that are forked from one that has imported everything, so a start costs no imports.

    python tests/faults/forked.py < ARGUMENTS

ARGUMENTS is a list of lists in JSON, the arguments of each start; prints a list of [exit code, output] in JSON.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

LIMIT_SECONDS = 120
ROOT = Path(__file__).resolve().parents[2]


def start(arguments: list[str], output: Path) -> int:
    """The exit code of main.py with `arguments`; its stdout and stderr are in `output`.

    JAX must not have looked for its devices yet: its threads would not be in the forked process.
    """
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    try:
        signal.alarm(LIMIT_SECONDS)  # a run that still goes on counts as one that did not end as it should
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.argv = ["main.py", *arguments]
        import main

        main.app.run(main.main, flags_parser=main._parse)
    except SystemExit as stop:
        sys.stderr.flush()
        os._exit(stop.code if isinstance(stop.code, int) else stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def import_all() -> None:
    """Once, for all starts."""
    sys.path.insert(0, str(ROOT))
    for name in ("tensorflow_datasets", "diffusion.programs.train"):
        importlib.import_module(name)


def starts(arguments: list[list[str]], directory: Path) -> list[tuple[int, str]]:
    """The exit code and the output of main.py with each of the argument lists, started in `directory`."""
    command = [sys.executable, __file__]
    result = subprocess.run(command, cwd=directory, input=json.dumps(arguments), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [(code, output) for code, output in json.loads(result.stdout)]


if __name__ == "__main__":
    import_all()
    ends = []
    with tempfile.NamedTemporaryFile() as output:
        for given in json.load(sys.stdin):
            code = start(given, Path(output.name))
            ends.append((code, Path(output.name).read_text()))
    print(json.dumps(ends))
