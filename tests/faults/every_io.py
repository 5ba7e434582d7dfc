"""The disk fails at each call of a training in turn: the run survives or prints one line, and nothing is lost.

    python tests/faults/every_io.py [--all | --number=N] [--errors EIO ENOSPC EACCES] [--begins new resumed]

A toy training with two checkpoints, validation, samples and a log runs once to list its calls in its directory, those
of Python and of Orbax's C++ alike: open, create, read, write, sync, rename, remove, list, stat. Then it runs again for
each kind of call on each kind of file (with --all for each call, with --number for N of them). The call fails with EIO
or EACCES, or, if it writes, with ENOSPC, as do all later ones until the program ends. Started once more without a
fault, the run must end with the bits of the undisturbed one. All of this is done for a new run and for a resumed one.
"""

import argparse
import collections
import errno
import faulthandler
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NamedTuple

import launch
from faulty_disk import Call, Disk, library

HERE = Path(__file__).resolve().parent
LIMIT_SECONDS = 600  # a run that takes so long hangs
STEPS, SAMPLES_AT = 4, 3
KEYS = {
    "schedule.num_steps": 4, "train.num_steps": STEPS, "train.log_every": 1, "train.checkpoint_every": 2,
    "train.sample_every": SAMPLES_AT, "sample.num_images": 4, "sample.num_previews": 4, "eval.num_images": -1,
    "data.validation": 8, "train.monitor_images": 8,
}  # fmt: skip
ALL = "open create read write sync rename remove list stat"
# How a call fails -> the kinds of calls that can, and whether all later ones fail, too.
ERRORS = {
    "EIO": (ALL, False),
    "ENOSPC": ("create write sync rename", True),
    "EACCES": ("open create rename remove list", False),
}


class End(NamedTuple):
    """How a run ended: its error, None if it came to its end; what it printed; the step it began at."""

    error: BaseException | None
    printed: str
    begun: int | None


BEGUN: list[int] = []  # the steps that runs of this process began at


def attempt(directory: Path) -> End:
    """Trains in `directory`, to the end or to an error."""
    import toy

    from diffusion.programs import train

    config = toy.config(**{key.replace(".", "__"): value for key, value in KEYS.items()})
    error, saved = None, [os.dup(number) for number in (1, 2)]
    BEGUN.clear()
    with tempfile.TemporaryFile() as output:
        for number in (1, 2):
            os.dup2(output.fileno(), number)
        try:
            train.run(config, directory)
        except BaseException as raised:
            error = raised
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, number)
                os.close(copy)
        output.seek(0)
        return End(error, output.read().decode(), BEGUN[0] if BEGUN else None)


def once(owner: object, name: str) -> None:
    """A function that is computed at its first call; later calls return the same."""
    make, made = getattr(owner, name), []

    def call(*arguments, **keys):
        if not made:
            made.append(make(*arguments, **keys))
        return made[0]

    setattr(owner, name, call)


def prepare() -> None:
    """Equal runs share their programs, and each kind of figure is drawn once."""
    import jax
    import toy
    from matplotlib.figure import Figure

    from diffusion import data
    from diffusion.experiment import build
    from diffusion.programs import sample, train
    from diffusion.runtime import orbax_noise
    from diffusion.training import loop, parallel

    orbax_noise.silence()
    toy.register()
    data.load, data.describe = toy.load, toy.describe
    make_state, resume, draw, figures = build.Experiment.initial_state, train.resume, Figure.savefig, {}
    build.Experiment.initial_state = lambda experiment: jax.device_get(make_state(experiment))
    for owner, name in (
        *((build, "experiment"), (build.Experiment, "initial_state"), (build.Experiment, "abstract_state")),
        *((parallel, "train_steps"), (parallel, "differing_replicas"), (loop, "monitor"), (sample, "Sampler")),
    ):
        once(owner, name)

    def watched(experiment, checkpoints):
        state = resume(experiment, checkpoints)
        BEGUN.append(int(state.step))
        return state

    def savefig(figure, file, **options):
        kind = sys._getframe(1).f_back.f_code
        if kind not in figures:
            buffer = io.BytesIO()
            draw(figure, buffer, **options)
            figures[kind] = buffer.getvalue()
        file.write(figures[kind])

    train.resume, Figure.savefig = watched, savefig


def is_one_line(error: BaseException) -> bool:
    """Whether main.py prints it as one line and ends with 2."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = isinstance(error, ValueError | ArithmeticError | MemoryError | RuntimeError) and (
        raised_in.startswith(str(HERE.parents[1] / "diffusion"))
    )
    return isinstance(error, OSError) or ours


def complete(directory: Path) -> set[int]:
    """The steps of the checkpoints that are complete."""
    from diffusion.runtime import verification

    found = (directory / "checkpoints").glob("[0-9]*")
    return {int(path.name) for path in found if path.name.isdecimal() and verification.is_complete(path)}


def end_of(directory: Path) -> dict:
    """What must be equal, bit by bit: rows, states, pictures and samples."""
    names = (f"samples_{SAMPLES_AT}.png", "samples.png", "progressive.png", "loss.png", "samples.npz", "config.json")
    found = launch.end(directory) | {name: (directory / name).read_bytes() for name in names}
    for step in sorted(complete(directory)):
        found[f"checkpoint {step}"] = json.loads((directory / f"checkpoints/{step}/digests/metadata").read_text())
    return found


def is_told(error: BaseException, broken: list[Call], code: int) -> bool:
    """Whether the error is one line with what the disk said or, where a library hides that, what was not written."""
    words = os.strerror(code) in str(error)
    # Orbax asks os.path.isdir and the like, which take a file that they cannot see for one that is not there. NumPy
    # says how many bytes it could not write, and not why.
    hidden = broken[0].kind == "stat" or "requested and" in str(error)
    return is_one_line(error) and (words or hidden and "could not be written" in str(error))


def is_silent(printed: str) -> bool:
    """Whether no traceback is printed, but for that of TensorBoard's thread, which nobody can catch."""
    tracebacks = printed.split("Traceback (most recent call last):")[1:]
    return all("tensorboardX" in text for text in tracebacks)


def has_damaged(directory: Path) -> bool:
    """Whether a whole checkpoint was moved aside; what is left of an interrupted save may be."""
    return any(path.name.isdecimal() for path in directory.glob("checkpoints/damaged/*/*"))


def wrongs(end: End, directory: Path, before: set[int], broken: list[Call], code: int, wanted: dict) -> list[str]:
    """What is wrong with a run that met a fault, and with the run that goes on from there."""
    wrong, saved = [], complete(directory)
    if end.error is not None and not is_told(end.error, broken, code):
        wrong.append("its error is not one line that tells what the disk said")
    if not is_silent(end.printed):
        wrong.append("it prints a traceback")
    if not before <= saved:
        wrong.append(f"the checkpoints {sorted(before - saved)} are gone")
    if has_damaged(directory):
        wrong.append("a checkpoint is taken for damaged")
    again = attempt(directory)
    if again.error is not None:
        return [*wrong, f"the same command ends with {again.error!r}"]
    if again.begun is not None and again.begun < max(saved, default=0):
        wrong.append(f"the same command begins at {again.begun} though {max(saved)} is saved")
    if has_damaged(directory):
        wrong.append("then a checkpoint is taken for damaged")
    now = end_of(directory)
    return wrong + [f"then {name} is another" for name in wanted if now.get(name) != wanted[name]]


class Study:
    """One way of failing, of a new run or of one that resumes.

    Args:
        begin: a run that was stopped; None for a new run.
        wanted: what `end_of` says of the undisturbed run.
        error: a key of ERRORS.
    """

    def __init__(self, root: Path, disk: Disk, begin: Path | None, wanted: dict, error: str):
        self._root, self._disk, self._begin, self._wanted, self._name = root, disk, begin, wanted, error
        self._code, (self._kinds, self._lasts) = getattr(errno, error), ERRORS[error]
        self._stderr = os.fdopen(os.dup(2), "w")  # 2 is another file while a run prints

    def _run(self, first: int, last: int) -> tuple[Path, End, list[Call]]:
        """A run whose calls `first` to `last` fail."""
        directory = self._root / "run"
        shutil.rmtree(directory, ignore_errors=True)
        if self._begin:
            shutil.copytree(self._begin, directory)
        with self._disk.failing(directory, self._kinds, first, last, self._code) as calls:
            end = attempt(directory)
        return directory, end, calls

    def _numbers(self, every: bool, number: int) -> list[int]:
        """The calls to break: all, or the last one of each place, or so many of these."""
        _, end, calls = self._run(0, 0)
        assert end.error is None, end
        places = {call.place(): number for number, call in enumerate(calls, start=1)}
        found = list(range(1, len(calls) + 1)) if every else sorted(places.values())
        return sorted(random.Random(0).sample(found, min(number or len(found), len(found))))

    def results(self, every: bool, number: int) -> tuple[collections.Counter, list[str]]:
        """How many runs ended how, and what went wrong."""
        ends, wrong, before = collections.Counter(), [], {2} if self._begin else set()
        for call in self._numbers(every, number):
            faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True, file=self._stderr)
            directory, end, calls = self._run(call, 1 << 30 if self._lasts else call)
            broken = [one for one in calls if one.failed]
            # Threads take turns, so a run may have fewer calls than the one that was counted.
            ends[("told" if end.error else "survived") if broken else "not met"] += 1
            if found := wrongs(end, directory, before, broken, self._code, self._wanted):
                place = " ".join(broken[0].place()) if broken else "no call"
                wrong.append(f"{self._name} at call {call}, {place}: {'; '.join(found)} ({end.error!r})")
                print(wrong[-1], end.printed, sep="\n", flush=True)
        faulthandler.cancel_dump_traceback_later()
        return ends, wrong


def main(every: bool, number: int, errors: list[str], begins: list[str], root: Path) -> None:
    """Prints how many faults were told and survived; raises if anything was lost."""
    prepare()
    disk, wrong, stopped = Disk(), [], root / "stopped"
    assert attempt(root / "straight").error is None
    wanted = end_of(root / "straight")
    launch.cut(root / "straight", stopped, 2)
    for error in errors:
        for begin in begins:
            study = Study(root, disk, stopped if begin == "resumed" else None, wanted, error)
            ends, found = study.results(every, number)
            wrong += found
            counts = ", ".join(f"{number} {how}" for how, number in sorted(ends.items()))
            print(f"{error}, {begin} run, {sum(ends.values())} faults: {counts}; {len(found)} wrong", flush=True)
    assert not wrong, f"{len(wrong)} wrong"
    print("after each fault the same command ends with the same bits")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--number", type=int, default=0)
    parser.add_argument("--errors", nargs="+", default=list(ERRORS), choices=ERRORS)
    parser.add_argument("--begins", nargs="+", default=["new", "resumed"], choices=["new", "resumed"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if "faulty_disk" not in os.environ.get("LD_PRELOAD", ""):
            variables = {"LD_PRELOAD": str(library(Path(folder))), "JAX_PLATFORMS": "cpu"}
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=os.environ | variables).returncode)
        sys.path.insert(0, str(HERE.parents[1]))
        main(arguments.all, arguments.number, arguments.errors, arguments.begins, Path(folder))
