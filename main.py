"""python main.py --config=configs/cifar10.py [--workdir=runs/cifar10] [--mode=MODE]

MODE is train, eval, sample, quality, classifier, compress, decompress, export or describe. For a run that exists its
directory is enough: python main.py --workdir=runs/cifar10 --mode=MODE
"""

import contextlib
import importlib
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from diffusion.runtime import streams

_MODES = {
    "train": "train",
    "eval": "evaluate",
    "sample": "sample",
    "quality": "quality",
    "classifier": "classifier",
    "compress": "compress",
    "decompress": "decompress",
    "export": "export",
    "describe": "describe",
}
_NEED = {"input": ("compress", "decompress"), "output": ("compress", "decompress", "export")}  # flags of some modes
_READ_A_CHECKPOINT = ("eval", "sample", "quality", *_NEED["output"])
_WRITE_NO_RESULTS = ("describe", "classifier")  # into a directory of the user's
_TAKE = _NEED | {"output": _READ_A_CHECKPOINT}
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "The experiment, a file in configs/; by default that of the run in --workdir. --config.KEY=VALUE changes one key.",
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory; by default runs/ and the config's name.")
_MODE = flags.DEFINE_enum("mode", "train", list(_MODES), "What to do; train resumes automatically.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "latest", "What train does not read: latest, best (the lowest val_loss that is kept) or a step."
)
_INPUT = flags.DEFINE_string(
    "input",
    None,
    "Of compress: train, test, validation, an .npz or .npy file or a folder of pictures; of decompress: the file.",
)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "Of compress: the file to write; of decompress: where the images go, an .npz file; of export: the new directory; "
    "of eval, sample and quality: a directory for the results, by default the run's own.",
)
_OTHER_DATA = flags.DEFINE_bool(
    "allow_other_data", False, "Of train: resume even if the data set is not the one that the run was trained with."
)
_FORK = flags.DEFINE_string(
    "fork", "", "Of train: DIR, DIR@best or DIR@STEP, a run from whose checkpoint a new run in --workdir goes on."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "Multi-process: HOST:PORT of process 0; not needed under srun or on TPU slices."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "The number of processes, with --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "The number of this process, from 0.")
# What flags and ml_collections raise for a command line that cannot be read.
_MISTAKES = (flags.Error, AttributeError, KeyError, TypeError, ValueError, ImportError, OSError)
_HELP = ("help", "helpshort", "helpfull", "helpxml")
_OF_RUN = Path(__file__).resolve().parent / "diffusion" / "experiment" / "of_run.py"  # a config file, of a run
_LEAVE_SECONDS = 30  # how long a process that stops waits for the others


def main(argv: list[str]) -> None:
    """Runs the mode; an error in the user's input prints one line and ends with exit code 2.

    A run that was stopped by a signal ends with exit code 75 (EX_TEMPFAIL): the same command continues it.
    """
    logging.set_verbosity(logging.WARNING)  # TFDS and JAX report each of their steps
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}; every argument is a --flag=value")
        if _CONFIG.value is None:
            raise ValueError(_no_config(_WORKDIR.value or "", _FORK.value, ""))
        # Imported here because JAX takes seconds that --help should not cost.
        from diffusion.experiment import build, config, workdir
        from diffusion.runtime import compiled_programs, orbax_noise, preemption, processes

        orbax_noise.silence()
        base = config_flags.get_config_filename(flags.FLAGS["config"])
        if fault := config.missing(base):
            raise ValueError(fault)
        resolved = config.completed(_CONFIG.value)
        config.check(resolved)
        chosen = config_flags.get_override_values(flags.FLAGS["config"])
        config.check_chosen(resolved, chosen, forks=bool(_FORK.value))
        _keep_freed_memory(resolved)
        processes.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        compiled_programs.keep(on_cpu=build.runs_on_cpu())
        base = "" if base.startswith(str(_OF_RUN)) else base
        if not base and _WORKDIR.value is None:
            raise ValueError("without --config a start from a run or an export needs --workdir, a new run's directory")
        mode = importlib.import_module(f"diffusion.programs.{_MODES[_MODE.value]}")
        if _CHECKPOINT.value != "latest" and _MODE.value not in _READ_A_CHECKPOINT:
            raise ValueError(f"--checkpoint={_CHECKPOINT.value} has no effect in --mode={_MODE.value}")
        which = {"checkpoint": _CHECKPOINT.value} if _MODE.value in _READ_A_CHECKPOINT else {}
        if _OTHER_DATA.value and _MODE.value != "train":
            raise ValueError(f"--allow_other_data has no effect in --mode={_MODE.value}")
        if _FORK.value and (_MODE.value != "train" or _WORKDIR.value is None):
            raise ValueError(f"--fork={_FORK.value} needs --mode=train and --workdir, the directory of the new run")
        of_train = {"base": base, "allow_other_data": _OTHER_DATA.value, "forked": _FORK.value}
        which |= of_train if _MODE.value == "train" else {}
        for name, value in (("input", _INPUT.value), ("output", _OUTPUT.value)):
            if value is not None and _MODE.value not in _TAKE[name]:
                raise ValueError(f"--{name}={value} has no effect in --mode={_MODE.value}")
            if not value and _MODE.value in _NEED[name]:
                raise ValueError(f"--mode={_MODE.value} needs --{name}")
            which |= {name: value} if value else {}
        try:
            directory = workdir.parse(_WORKDIR.value or f"runs/{Path(base).stem}")
            _open(directory)
            if (idle := config.idle_fields(resolved, chosen)) and processes.is_first():
                unused = f"{', '.join(idle)}: no effect with model.network={resolved.model.network!r}"
                print(f"warning: {unused}", file=sys.stderr)
            mode.run(workdir.continued(resolved, directory, chosen), directory, **which)
        except preemption.Preempted as stop:
            _stop(stop.reason, stop.code)
    except (ValueError, OSError, ArithmeticError, MemoryError, RuntimeError) as error:
        # An error that this project raised is one line for the user; any other keeps its traceback.
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        ours = Path(__file__), *(Path(__file__).parent / "diffusion").rglob("*.py")
        if not isinstance(error, OSError) and raised_in not in ours:
            raise
        _stop(_error_line(error), 2)


def _open(directory: Path) -> None:
    """Says where it runs and where the results go, before anything else."""
    from diffusion.reporting import opening
    from diffusion.runtime import processes

    results = "" if _MODE.value in _WRITE_NO_RESULTS else _OUTPUT.value or str(directory)
    if processes.is_first():
        print(opening.line(_MODE.value, results), file=sys.stderr)
    if hint := opening.missed_gpu():  # any process may be the one that misses it
        print(f"warning: {hint}", file=sys.stderr)


def _keep_freed_memory(config: ConfigDict) -> None:
    """Has malloc keep freed memory where a batch's maps are large; it must be told before JAX starts its devices."""
    from diffusion.experiment import build
    from diffusion.runtime import allocator

    try:
        height, width, _ = build.describe_data(config).image_shape
    except (ValueError, OSError):  # the mode says so, if it needs the data
        return
    channels = config.get("unet", {}).get("channels", 0)
    if 4 * config.train.batch_size * height * width * channels >= allocator.LARGE_MAP:
        allocator.keep_freed_memory()


def _parse(argv: list[str]) -> list[str]:
    # First, because it ends the program: a config imports JAX, which takes seconds.
    asks_for_help = [argument for argument in argv[1:] if argument.lstrip("-") in _HELP]
    try:
        return flags.FLAGS([argv[0], *asks_for_help, *_of_run(argv), *argv[1:]])
    except Exception as error:
        from diffusion.experiment import config

        if fault := config.fault_of_file(_config_path(argv), error):
            _fail(fault)
        if "flag 'config." in str(error) and not _config_path(argv):
            _fail(_no_config(*_named_runs(argv)))
        if not isinstance(error, _MISTAKES):
            raise
        given = [argument.partition("=")[0].lstrip("-") for argument in argv[1:]]
        keys = [name.removeprefix("config.") for name in given if name.startswith("config.")]
        _fail(config.fault_of_key(keys, error) or error)


def _config_path(argv: list[str]) -> str:
    """What --config is; "" where it is not given."""
    following = dict(zip(argv, argv[1:], strict=False))
    values = [argument.partition("=")[2] for argument in argv if argument.lstrip("-").startswith("config=")]
    return (values or [following.get("--config", "")])[-1]


def _of_run(argv: list[str]) -> list[str]:
    """--config with that of the run in --workdir, --fork or init_from, where no other is given; [] otherwise."""
    if any(argument.lstrip("-").partition("=")[0] == "config" for argument in argv[1:]):
        return []
    from diffusion.runtime import files

    workdir, fork, start = _named_runs(argv)
    of_export = files.expanded(start) / "model.json"
    named = [workdir, *(name.rpartition("@")[0] or name for name in (fork, start))]
    found = [*(files.expanded(name) / "config.json" for name in named if name), *([of_export] if start else [])]
    existing = [path.parent for path in found if path.exists()]
    return [f"--config={_OF_RUN}:{existing[0]}"] if existing else []


def _named_runs(argv: list[str]) -> list[str]:
    """What --workdir, --fork and --config.init_from are; "" where they are not given."""
    given, names = flags.FlagValues(), ("workdir", "fork", "config.init_from")
    for name in names:
        flags.DEFINE_string(name, "", "", flag_values=given)
    with contextlib.suppress(flags.Error):  # the whole command line is parsed afterwards
        given(argv, known_only=True)
    return [given[name].value for name in names]


def _no_config(workdir: str, fork: str, start: str) -> str:
    """Why there is no config: neither --config nor the config.json of a run."""
    named = {"--fork": fork, "--config.init_from": start, "--workdir": "" if fork or start else workdir}
    without = [f"{flag}={value} holds no run (no config.json)" for flag, value in named.items() if value]
    example = "for example --config=configs/digits.py, or --workdir with the directory of a run"
    return f"{', and '.join(['no --config is given', *without])}; {example}"


def _error_line(reason: Exception | str) -> str:
    return f"error: {' '.join(str(reason).split())}"


def _fail(reason: Exception | str) -> NoReturn:
    print(_error_line(reason), file=sys.stderr)
    sys.exit(2)


def _stop(reason: str, code: int) -> NoReturn:
    """Ends the process with `code`, and with `reason` as the last line that it prints.

    Everything is closed and saved by then, but threads of XLA, Orbax and TensorBoard may still be running. If Python
    shuts down while they run, they can crash, which would lose the exit code, or print after the error line. So Python
    is not shut down. In a multi-process run the processes wait for each other, as JAX would at Python's exit. If the
    others do not come, because only this one failed, it ends without them: JAX would wait for minutes.
    """
    from jax import distributed

    is_one_of_several = distributed.is_initialized()
    if is_one_of_several:
        impatience = threading.Timer(_LEAVE_SECONDS, os._exit, (code,))
        impatience.daemon = True
        impatience.start()
    with contextlib.suppress(OSError):  # the disk that is full may hold the log as well
        sys.stderr.write(f"{reason}\n")  # at once, or the lines of two processes with one log would mix
        sys.stderr.flush()
        sys.stdout.flush()
    if is_one_of_several:
        with contextlib.suppress(RuntimeError):  # another process is gone
            distributed.shutdown()
    os._exit(code)


if __name__ == "__main__":
    streams.guard()
    app.run(main, flags_parser=_parse)
