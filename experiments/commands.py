"""The command line of a study: the parser of its flags, and its exit codes."""

import argparse
import math
import sys
from collections.abc import Callable
from typing import NoReturn

from diffusion.runtime import streams
from diffusion.runtime.preemption import Preempted


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help says more\n")


def argument_parser(description: str) -> argparse.ArgumentParser:
    """A parser without flags. The description, a module's docstring, is printed unchanged."""
    return Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def number(text: str, flag: str, kind: type[int] | type[float], least: float = -math.inf) -> int | float:
    """The number in `text`. Raises a ValueError that names the flag if it is not one, or is less than `least`."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:
        wanted = "an integer" if kind is int else "a number"
        raise ValueError(f"{flag}: {text!r} is not {wanted}" + f" ≥ {least}" * (least > -math.inf))
    return value


def numbers(text: str, flag: str, kind: type[int] | type[float], least: float = -math.inf) -> list[int | float]:
    """The numbers of a comma-separated list.

    Raises:
        ValueError: one is given twice, or an error of `number`.
    """
    found = [number(part, flag, kind, least) for part in text.split(",")]
    if twice := [value for i, value in enumerate(found) if value in found[:i]]:
        raise ValueError(f"{flag}={text} names {twice[0]} twice")
    return found


def exit_with(main: Callable[[], int | None]) -> None:
    """Ends the program with the exit code of `main`.

    An error in the input prints one line and exits with code 2. A signal prints one line and exits with code 75.
    """
    streams.guard()
    try:
        sys.exit(main())
    except Preempted as stop:
        print(stop.reason, file=sys.stderr)
        raise
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
