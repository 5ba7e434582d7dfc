"""Unfinished files of decoded pictures. Pictures are appended, and finished work survives a kill."""

import contextlib
import io
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Int32, UInt8

from diffusion.runtime import files

SAVE_SECONDS = 10.0  # a kill loses at most the work of this time


def of(path: Path) -> Path:
    """The unfinished file that becomes `path`."""
    return path.with_name(f"{path.name}.unfinished")


class Unfinished:
    """Pictures of one shape as an .npy file, and their classes, both incomplete.

    A file beside them records how many are safely on the disk, even after a power failure. If it is absent, the work
    starts again.

    Args:
        file: from `files.alone`, so that no other process writes to it.
        pixels_path, classes_path: the final paths.
        shape: the shape of all pictures, [N, H, W, C].
    """

    def __init__(self, file: BinaryIO, pixels_path: Path, classes_path: Path, shape: tuple[int, ...]):
        self._file, self._shape, self._paths = file, shape, (pixels_path, classes_path)
        self.path = Path(file.name)
        # Without file locks each process has a file of its own, and so it needs its own classes.
        self._classes_path = self.path.with_name(self.path.name.replace(pixels_path.name, classes_path.name, 1))
        self._count_path = self.path.with_name(f"{self.path.name}.count")
        self._saved = time.monotonic()
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        with self._named():
            for path in self.path.parent.glob(f"{self._count_path.name}.*.tmp"):  # of a process that was killed
                path.unlink(missing_ok=True)
            self._classes = self._classes_path.open("a+b")
            self.num_done = self._kept(len(header.getvalue()))
            self._file.truncate(len(header.getvalue()) + self.num_done * self._image_bytes if self.num_done else 0)
            self._classes.truncate(4 * self.num_done)
            if not self.num_done:
                self._file.write(header.getvalue())

    @property
    def _image_bytes(self) -> int:
        return int(np.prod(self._shape[1:]))

    def _kept(self, header_bytes: int) -> int:
        """The number of pictures that are safely on the disk."""
        try:
            count = int(self._count_path.read_text())
        except (FileNotFoundError, ValueError):
            return 0
        sizes = [os.fstat(file.fileno()).st_size for file in (self._file, self._classes)]
        is_there = sizes[0] >= header_bytes + count * self._image_bytes and sizes[1] >= 4 * count
        return count if 0 <= count <= self._shape[0] and is_there else 0

    def append(self, pixels: UInt8[np.ndarray, "b h w c"], classes: Int32[np.ndarray, " b"]) -> None:
        """Appends the next pictures. From time to time it makes all of them safe."""
        with self._named():
            self._file.write(pixels.data)
            self._classes.write(classes.tobytes())
            self.num_done += len(pixels)
            if time.monotonic() > self._saved + SAVE_SECONDS:
                self.save()

    def save(self) -> None:
        """Makes everything appended so far safe."""
        with self._named():
            for file in (self._file, self._classes):
                file.flush()
                os.fsync(file.fileno())
            files.write_text(self._count_path, str(self.num_done))
            self._saved = time.monotonic()

    def finish(self, has_labels: bool) -> None:
        """Gives both files their final names. The pictures come last: their name means that all is done."""
        pixels_path, classes_path = self._paths
        self.save()
        if has_labels:
            self._classes.seek(0)
            classes = np.frombuffer(self._classes.read(), np.int32)
            with files.replacing(classes_path) as file:
                np.save(file, classes)
        with self._named():
            os.replace(self.path, pixels_path)
        self.close()
        for path in (self._classes_path, self._count_path):
            path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Deletes all its files."""
        self.close()
        for path in (self._classes_path, self._count_path, self.path):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be flushed is not counted either
            self._classes.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = "the decoded pictures are kept, and the same command continues"
            raise OSError(f"{self._paths[0]} could not be written ({error.strerror or error}); {kept}") from error


def remove_left_over(pixels_path: Path, split: str, fingerprint: str) -> None:
    """Deletes files beside `pixels_path` of this split that dead processes left or that no process can continue.

    Args:
        fingerprint: the fingerprint of the present record files.
    """
    for path in sorted(pixels_path.parent.glob(f"*-{split}-*.npy.*")):
        with contextlib.suppress(OSError):
            if re.fullmatch(r"(decoded|classes)-.+\.npy\.(.+\.)?[0-9a-f]{32}\.tmp(\.count)?", path.name):
                if time.time() > path.stat().st_mtime + files.LEFT_SECONDS:
                    path.unlink()
            elif path.name.startswith("decoded-") and path.name.endswith(".npy.unfinished"):
                if f"-{fingerprint}." not in path.name and files.is_free(path):
                    classes = path.with_name(path.name.replace("decoded-", "classes-", 1))
                    for one in (classes, path.with_name(f"{path.name}.count"), path):
                        one.unlink(missing_ok=True)
