"""Standard streams that never stop the program: if closed, unread, on a lost terminal, or unable to encode a letter."""

import errno
import importlib.util
import io
import os
import select
import stat
import sys
from collections.abc import Container

# The other end is gone: `| head -1` has read its line, the terminal was closed, or the descriptor is none any more.
GONE = frozenset({errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF})
EVERY = frozenset(errno.errorcode)


class _Lasting(io.FileIO):
    """A stream that drops text which it cannot write, for some errors."""

    def __init__(self, descriptor: int, ignored: Container[int]):
        super().__init__(descriptor, "w", closefd=False)
        self._ignored = ignored

    def write(self, data) -> int | None:
        try:
            while (written := super().write(data)) is None:  # somebody made the pipe non-blocking, and it is full
                select.select([], [self], [])
            return written
        except OSError as error:
            if error.errno not in self._ignored:
                raise
            if error.errno in GONE:
                _open_nowhere(self.fileno())  # what libraries write to the descriptor, too
            return len(data)


def guard() -> None:
    """Makes this process's standard streams last. A program calls it first. On Windows it ends the program.

    A closed stream is opened to nowhere, so that no file gets its descriptor and a library's messages with it. Text
    that nobody can read any more is dropped, and the run goes on. On stderr, on which nothing depends, this holds for
    every failure. On stdout a full or failing disk is an error. Characters that the encoding lacks are escaped.
    """
    if importlib.util.find_spec("fcntl") is None:
        print("error: this needs Linux or macOS; on Windows, run it in WSL 2", file=sys.stderr)
        sys.exit(2)
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            _open_nowhere(descriptor)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)
    if sys.stdout is sys.__stdout__:  # a test or a notebook has put another one there
        sys.stdout = sys.__stdout__ = _lasting(sys.stdout, 1, _gone(1))
    if sys.stderr is sys.__stderr__:
        sys.stderr = sys.__stderr__ = _lasting(sys.stderr, 2, EVERY)


def _gone(descriptor: int) -> frozenset[int]:
    """The errors by which nobody reads what is written; in a file, EIO is the disk's."""
    return GONE - {errno.EIO} if stat.S_ISREG(os.fstat(descriptor).st_mode) else GONE


def _open_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere == descriptor:
        os.set_inheritable(descriptor, True)
    else:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _lasting(before: io.TextIOWrapper | None, descriptor: int, ignored: Container[int]) -> io.TextIOWrapper:
    """In the place of `before`, which Python makes None where the descriptor was closed."""
    if before is not None:
        before.flush()
    raw = _Lasting(descriptor, ignored)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding="utf-8" if before is None else before.encoding,
        errors="backslashreplace",
        line_buffering=descriptor == 2 or before is not None and before.line_buffering,
        write_through=before is not None and before.write_through,
    )
