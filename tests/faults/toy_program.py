"""Runs diffusion/programs with the toy network and the toy's data, also as one of several processes.

    python tests/faults/toy_program.py MODE[,MODE...] WORKDIR [--KEY=VALUE ...]
        [--coordinator=HOST:PORT --num_processes=N --process_id=I]
"""

import ast
import importlib
import sys
from pathlib import Path

import toy

from diffusion import data
from diffusion.runtime import preemption, processes


def main(modes: str, directory: Path, flags: list[str]) -> None:
    given = dict(flag.lstrip("-").split("=", 1) for flag in flags)
    numbers = [int(given.pop(name)) if name in given else None for name in ("num_processes", "process_id")]
    processes.join(given.pop("coordinator", ""), *numbers)
    toy.register()
    data.load, data.describe = toy.load, toy.describe
    keys = {key.replace(".", "__"): ast.literal_eval(value) for key, value in given.items()}
    try:
        for mode in modes.split(","):
            importlib.import_module(f"diffusion.programs.{mode}").run(toy.config(**keys), directory)
    except preemption.Preempted as stop:
        print(stop.reason)
        sys.exit(stop.code)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
