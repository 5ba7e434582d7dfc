"""python main.py --config=configs/cifar10.py [--workdir=runs/cifar10] [--mode=train|eval|sample|describe]"""

import contextlib
import importlib
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

_MODES = {"train": "train", "eval": "evaluate", "sample": "sample", "describe": "describe"}
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment, a file of configs/; --config.KEY=VALUE changes one key of it."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; by default runs/ and the config's name.")
_MODE = flags.DEFINE_enum("mode", "train", list(_MODES), "What to do; train resumes by itself.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "Of several processes: HOST:PORT of the first, or auto; not needed under srun and on TPU slices."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are, with --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")
_LEAVE_SECONDS = 30  # how long a process that stops waits for the others


def main(argv: list[str]) -> None:
    """Runs the mode; what is wrong with its input is one sentence and exit code 2.

    A run that a signal stopped ends with exit code 75 (EX_TEMPFAIL): the same command continues it.
    """
    logging.set_verbosity(logging.WARNING)  # TFDS, JAX and Orbax report each of their steps
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}; every argument is a --flag=value")
        if _CONFIG.value is None:
            raise ValueError("no --config is given; for example --config=configs/digits.py")
        # Imported here because JAX takes seconds that --help should not cost.
        import jax

        from diffusion.experiment import config
        from diffusion.runtime import preemption, processes

        config.check(_CONFIG.value)
        processes.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        # On CPUs a program that was compiled for one processor may not run on the next one that reads the same folder.
        if not jax.config.jax_compilation_cache_dir and jax.default_backend() != "cpu":
            jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/diffusion/compiled"))
        name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
        mode = importlib.import_module(f"diffusion.programs.{_MODES[_MODE.value]}")
        try:
            mode.run(_CONFIG.value, Path(_WORKDIR.value or f"runs/{name}"))
        except preemption.Preempted as stop:
            _stop(stop.reason, stop.code)
    except (ValueError, OSError, ArithmeticError, MemoryError, RuntimeError) as error:
        # An error that this project raised is a sentence for the user; any other keeps its traceback.
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        ours = Path(__file__), *(Path(__file__).parent / "diffusion").rglob("*.py")
        if not isinstance(error, OSError) and raised_in not in ours:
            raise
        _stop(_sentence(error), 2)


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, ImportError, OSError) as error:
        from diffusion.experiment import config

        for argument in argv[1:]:
            key = argument.partition("=")[0].lstrip("-").removeprefix("config.")
            if argument.lstrip("-").startswith("config.") and key not in config.all_keys():
                _fail(config.unknown(key))
        _fail(error)


def _sentence(reason: Exception | str) -> str:
    return f"error: {' '.join(str(reason).split())}"


def _fail(reason: Exception | str) -> NoReturn:
    print(_sentence(reason), file=sys.stderr)
    sys.exit(2)


def _stop(reason: str, code: int) -> NoReturn:
    """Ends the process with `code`, and with `reason` as the last line that it prints.

    All is closed and saved by then, but threads of XLA and Orbax may still be at work. Where Python is taken down
    around them they can crash, which would cost the exit code, or complain after the sentence. So it is not taken
    down, except among several processes, which take leave of each other at their exits. If the others do not come to
    theirs, because only this one failed, it goes without them: JAX would wait for minutes and then lose the code.
    """
    from jax import distributed

    is_one_of_several = distributed.is_initialized()
    if is_one_of_several:
        impatience = threading.Timer(_LEAVE_SECONDS, os._exit, (code,))
        impatience.daemon = True
        impatience.start()
    with contextlib.suppress(OSError):  # the disk that is full may hold the log as well
        print(reason, file=sys.stderr, flush=True)
        sys.stdout.flush()
    if is_one_of_several:
        sys.exit(code)
    os._exit(code)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
