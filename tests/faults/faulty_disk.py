"""The library of faulty_disk.c. If it is preloaded, it makes disk calls fail, including those of C++."""

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_suffix(".c")


def library(folder: Path) -> Path:
    """The library, compiled. Raises a FileNotFoundError where there is no C compiler."""
    if not (compiler := shutil.which("cc") or shutil.which("gcc")):
        raise FileNotFoundError(f"there is no C compiler for {SOURCE}")
    built = folder / "faulty_disk.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", built, SOURCE, "-ldl"], check=True)
    return built


class Call(NamedTuple):
    """One that concerns the run's directory."""

    failed: bool
    kind: str
    path: str

    def place(self) -> tuple[str, str]:
        """The kind, and the path without numbers and random parts: equal for calls that do the same thing."""
        return self.kind, re.sub(r"\d+", "N", re.sub(r"[0-9a-f]{12,}", "X", self.path))


class Disk:
    """The library, which is preloaded in this process."""

    def __init__(self):
        self._library = ctypes.CDLL(None)
        text, number = ctypes.c_char_p, ctypes.c_long
        self._library.faults_begin.argtypes = text, text, number, number, ctypes.c_int
        self._library.faults_told.restype = text

    @contextlib.contextmanager
    def failing(self, directory: Path, kinds: str, first: int, last: int, code: int) -> Iterator[list[Call]]:
        """Calls `first` to `last` in a directory fail; the list has all calls in the end."""
        calls: list[Call] = []
        self._library.faults_begin(os.fsencode(f"{directory}/"), kinds.encode(), first, last, code)
        try:
            yield calls
        finally:
            for line in self._library.faults_told().decode().splitlines():
                mark, kind, path = line.split(" ", 2)
                calls.append(Call(mark == "!", kind, path.replace(str(directory), "")))
            self._library.faults_begin(b"", b"", 0, 0, 0)
