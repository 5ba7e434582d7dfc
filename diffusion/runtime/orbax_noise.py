"""Hides Orbax's messages about saves: about good ones, and about failed ones, whose error reaches the caller anyway.

The exception of a failed save is long: TensorStore lists its operation, its database and its settings, and at the end
the disk's own message.
"""

import functools
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any


@functools.cache
def silence() -> None:
    """Hides these messages for the rest of the process.

    Orbax reports every phase of every save through absl's logger. If a save fails, asyncio's logger also reports each
    of its failed writes.
    """
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())
    sys.unraisablehook = _without_late_writes(sys.unraisablehook)


def _without_late_writes(show: Callable[[Any], None]) -> Callable[[Any], None]:
    """`show`, a sys.unraisablehook, for all but the writes that end after another one of their save has failed.

    Orbax closes its event loop at the first failure. Each write that is still going on then finds it closed: hundreds
    of tracebacks, in which the error that the caller gets would be lost.
    """

    def hook(unraisable: Any) -> None:
        if not (unraisable.object is None and str(unraisable.exc_value) == "Event loop is closed"):
            show(unraisable)

    return hook


def reason(error: Exception) -> str:
    """The reason why a save failed, in a few words: the disk's message, if there is one."""
    if number := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(number[1]))
    return str(error).partition("\n")[0][:200]
