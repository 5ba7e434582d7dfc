"""Checks, completes, compares, reads and writes configs. `schema` lists their keys."""

import difflib
import json
import os
import re
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import Any

from absl import flags
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict, config_flags

from diffusion import __version__
from diffusion.experiment import names
from diffusion.experiment.schema import KEYS, Partly, all_keys, unknown
from diffusion.networks import NETWORKS

VERSION = "version"  # of the program that wrote config.json; not a config key
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def flatten(config: ConfigDict) -> dict[str, Any]:
    """{"unet.channels": 128, ...}; a value outside all groups keeps its name."""
    return flatten_dict(config.to_dict(), sep=".")


def check(config: ConfigDict) -> None:
    """Raises a ValueError with one line on the first key that is unknown, missing, mistyped or out of range."""
    flat, known = flatten(config), all_keys()
    for name in sorted(flat.keys() - known.keys()):
        raise ValueError(unknown(name))
    for name in sorted(KEYS.keys() - flat.keys()):
        raise ValueError(f"config key {name} is missing")
    for name, key in known.items():
        problem = key.allowed.problem(flat[name]) if name in flat else None
        if problem:
            raise ValueError(f"config key {name} {problem}")


def completed(config: Any) -> ConfigDict:
    """The config, locked. A key that did not exist when the config was written gets its default.

    Raises:
        ValueError: it is not a ConfigDict, or has a key that does not exist.
    """
    if getattr(config, "to_dict", None) is None:  # a missing file raises its own error at the first use
        raise ValueError(f"get_config() of the config file must return a ConfigDict, not {config!r:.60}")
    flat = flatten(config)
    for name in sorted(flat.keys() - all_keys().keys()):
        raise ValueError(unknown(name))
    defaults = {name: key.default for name, key in KEYS.items()}
    return ConfigDict(unflatten_dict(defaults | flat, sep=".")).lock()


def check_chosen(config: ConfigDict, chosen: Collection[str], forks: bool) -> None:
    """Raises a ValueError if a key about the start of a run has no effect.

    Args:
        chosen: the keys that the user set.
        forks: whether the run continues from a checkpoint of another run.
    """
    if forks and "init_from" in chosen:
        raise ValueError("--fork continues a run and --config.init_from begins a new one; give one of the two")
    if "init_adapt" in chosen and config.init_adapt and not config.init_from:
        raise ValueError("init_adapt=True has no effect without init_from, the run or the weights to start from")


def idle_fields(config: ConfigDict, chosen: Collection[str]) -> list[str]:
    """The chosen keys that are fields of another network than the config's, or that model.network sets itself."""
    network, found = names.parse(config.model.network), []
    for name in chosen:
        group, _, field = name.partition(".")
        if group in NETWORKS and (group != network.name or field in network.arguments):
            found.append(name)
    return found


def to_json(config: ConfigDict, lacking: Collection[str] = ()) -> str:
    """The text of config.json: the resolved config and the program's version.

    Args:
        lacking: keys to leave out if their absence means their value.
    """
    known = all_keys()
    said = {
        name: value
        for name, value in flatten(config).items()
        if name not in lacking or value != known[name].when_absent
    }
    return json.dumps({VERSION: __version__} | unflatten_dict(said, sep="."), indent=2, sort_keys=True) + "\n"


def read(path: Path) -> ConfigDict:
    """The config in a config.json. Raises the errors of `from_json`, with the name of the file."""
    try:
        return from_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def lacking(path: Path) -> set[str]:
    """The keys that a config.json lacks because they did not exist when the run began.

    Raises the errors of `read`.
    """
    read(path)  # checks it
    text = path.read_text()
    return all_keys().keys() - flatten_dict(json.loads(text), sep=".").keys()


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote, locked. JSON has only lists; in a config all of them become tuples.

    A key that did not exist in the run's version gets the value that reproduces that version's behaviour.

    Raises:
        ValueError: it is not the JSON of a config, or has a key that this version does not have. The caller puts the
            file's name before the message.
    """

    def with_tuples(group: dict[str, Any]) -> dict[str, Any]:
        return {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()}

    try:
        groups = json.loads(text, object_hook=with_tuples)
    except ValueError:
        groups = None
    if not isinstance(groups, dict):
        raise ValueError("is damaged: it is not the JSON of a config; restore it or take another --workdir")
    version = f"version {groups.pop(VERSION)}" if VERSION in groups else "an earlier version"
    flat = flatten_dict(groups, sep=".")
    for name in sorted(flat.keys() - all_keys().keys()):
        raise ValueError(f"has the config key {name}, which version {__version__} does not have; {version} wrote it")
    then = {name: key.when_absent for name, key in KEYS.items()}
    return ConfigDict(unflatten_dict(then | flat, sep=".")).lock()


def from_file(path: str, overrides: dict[str, str]) -> ConfigDict:
    """The config of a file in configs/, as main.py resolves it. Its values are not checked.

    Args:
        path: the value of --config.
        overrides: config key -> value, written as for --config.KEY=VALUE.

    Raises:
        ValueError: the file cannot be read, a key does not exist, or a value cannot be read as the type in the file.
    """
    argv = ["main.py", f"--config={path}", *(f"--config.{key}={value}" for key, value in overrides.items())]
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        values(argv)
        return completed(holder.value)
    except Exception as error:
        if fault := fault_of_file(path, error) or fault_of_key(overrides, error):
            raise ValueError(fault) from error
        if isinstance(error, flags.Error | AttributeError | TypeError | ValueError | ImportError | OSError):
            raise ValueError(str(error)) from error
        raise


def fault_of_key(given: Collection[str], error: BaseException) -> str:
    """The first given key that does not exist, or whose group the config lacks; "" if there is none.

    Args:
        error: the error raised when the keys were set.
    """
    known = all_keys()
    if (flag := getattr(error, "flagname", "")) in known:  # of an unknown flag
        return f"config key {flag} is set by --config.{flag}=VALUE"
    for name in given:
        group, _, field = name.rpartition(".")
        if name not in known:
            return unknown(name)
        if isinstance(error, KeyError) and repr(group) in str(error):
            as_argument = f"model.network=\"{group}({field}=…)\""
            return f"config key {name}: the config has no keys of {group}; {as_argument} sets a field of that network"
    return ""


def missing(path: str) -> str:
    """That --config names no file, and the config of the nearest name; "" if it does, or if it is not given."""
    file = Path(path.partition(":")[0])
    if not path or file.is_file():
        return ""
    ours = {found.stem: found for found in CONFIGS.rglob("*.py")}
    near = [os.path.relpath(ours[stem]) for stem in difflib.get_close_matches(file.stem, ours, n=1)]
    return f"--config={path} is no file" + (f"; did you mean {near[0]}?" if near else "")


def fault_of_file(path: str, error: BaseException) -> str:
    """The place where a config file fails, and Python's message; "" if the error comes from elsewhere.

    If there is no such file, the result of `missing`.

    Args:
        path: the value of --config, without the argument of `get_config`.
    """
    if fault := missing(path):
        return fault
    if isinstance(error, SyntaxError) and not error.filename:  # Python could not begin to read it
        return f"--config={path}: {error}; it must be Python in UTF-8"
    file = Path(path.partition(":")[0]).resolve()
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):  # the file is not run, so the traceback has no frame of it
        frames, error = [*frames, (error.filename or "", error.lineno)], SyntaxError(error.msg)
    lines = [line for name, line in frames if Path(name).resolve() == file]
    return f"--config={path}, line {lines[-1]}: {type(error).__name__}: {error}" if lines else ""


def differing(config: ConfigDict, saved: ConfigDict) -> list[str]:
    """ "key: saved → now" for each key that shaped the saved run and differs now, with the reason if there is one.

    A missing field of a network counts as its default.
    """
    known = all_keys()
    defaults = {name: key.default for name, key in known.items()}
    now, then = defaults | flatten(config), defaults | flatten(saved)
    changes = []
    for name, key in sorted(known.items()):
        if key.free is True or first_spelling(now[name]) == first_spelling(then[name]):
            continue
        change = f"{name}: {then[name]} → {now[name]}"
        if not isinstance(key.free, Partly):
            changes.append(change)
        elif reason := key.free.why_not(config, then[name]):
            changes.append(f"{change}, {reason}")
    return changes


def first_spelling(value: Any) -> Any:
    """A config value as the first version wrote it. Only one argument of a learned schedule differs from today."""
    if not isinstance(value, str):
        return value
    return re.sub(r"\binner=(['\"])second_moment\1", r"inner=\1variance\1", value)
