"""Files that are written completely or not at all, locked directories, and the place of files that can be remade."""

import contextlib
import errno
import logging
import os
import socket
import stat
import time
import tokenize
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from diffusion.runtime import preemption

try:
    import fcntl
    import resource
except ImportError:  # Windows, where `streams.guard` ends every program
    fcntl = resource = None

NO_HOME = "no home directory is known (HOME is not set, and the user is not in /etc/passwd)"
# What NumPy raises for an .npy or .npz file that is cut or damaged; an OSError is the disk's.
OF_HEADER = SyntaxError, tokenize.TokenError  # the header is read as Python
DAMAGE = (ValueError, KeyError, EOFError, RuntimeError, *OF_HEADER, zipfile.BadZipFile, zlib.error)
MAX_BEGIN_BYTES = 128  # of a temporary file's name; file systems take 255 bytes
SWITCH = "DIFFUSION_LOCK"  # 0 does without a lock where the file system has none
LEFT_SECONDS = 3600.0  # a temporary file that nobody wrote to for so long is nobody's
WAIT_SECONDS = 0.5  # between two looks at a file that another process has
OTHER_FILES = 512  # that are open beside those of a data set
LOCK = "lock"  # holds the name of its owner; what counts is the lock on it, which ends with the process


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file open for writing. It replaces `path` once everything is written.

    `path` does not change until then, or if an error is raised. Several processes may do this at once; the last one
    wins.

    Raises:
        OSError: the file could not be written; the message names it.
    """
    temporary = unfinished(path, "tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power failure could leave the new name and nothing in the file
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} could not be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def unfinished(path: Path, ending: str) -> Path:
    """A name beside `path` that no other process takes. It is short enough if the name of `path` is."""
    begin = os.fsencode(path.name)[:MAX_BEGIN_BYTES].decode(errors="ignore")
    return path.with_name(f"{begin}.{uuid.uuid4().hex}.{ending}")


def write_text(path: Path, text: str) -> None:
    """Writes a text file, completely or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def locked(directory: Path, advice: str) -> Iterator[None]:
    """Makes a directory and keeps other processes out of it.

    Raises:
        ValueError: another process is at work there; the message names it and ends with `advice`.
        OSError: the file system cannot lock files, and DIFFUSION_LOCK is not 0.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise ValueError(f"{directory} is in use by {owner}; {advice}") from error
            if os.environ.get(SWITCH) != "0":
                without = f"if no other process works there, {SWITCH}=0 goes on without"
                raise OSError(f"{directory}: its file system has no locks ({error.strerror}); {without}") from error
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}", file=file)
        file.flush()
        yield


@contextlib.contextmanager
def alone(path: Path, waiting: str) -> Iterator[BinaryIO]:
    """The file at `path`, made if necessary and open for appending. Other processes that ask for it wait meanwhile.

    The caller first checks whether another process has done the work, and renames or deletes the file at the end.
    Without locks in the file system, the file belongs to this process alone and is deleted.

    Args:
        waiting: the message before waiting.
    """
    while True:
        with path.open("a+b") as file:
            try:
                _wait_for(file, waiting)
            except OSError:
                break
            if _is_at(file, path):
                yield file
                return
    own = unfinished(path, "tmp")
    try:
        with own.open("a+b") as file:
            yield file
    finally:
        own.unlink(missing_ok=True)


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether the file is still at its path. Another process may have renamed it, and a third one made a new file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _wait_for(file: BinaryIO, waiting: str) -> None:
    """Locks a file. Raises an OSError where the file system has no locks."""
    is_told = False
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        if not is_told:
            logging.warning(waiting)
        is_told = True
        preemption.point()
        time.sleep(WAIT_SECONDS)


def is_free(path: Path) -> bool:
    """Whether no process holds the file of `alone`."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def allow_open(number: int) -> None:
    """Raises this process's limit of open files if necessary. Systems often allow 1,024 by default.

    Raises:
        OSError: the system refuses so many open files.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise OSError(f"{number:,} files must be open at a time, but a process may open {hard:,}: see `ulimit -Hn`")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def expanded(text: str | Path) -> Path:
    """The path, with a ~ at its beginning replaced by the home directory.

    Raises:
        ValueError: there is no such home directory.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{text}: {NO_HOME}; write the whole path") from error


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/diffusion`, or ~/.cache/diffusion; it need not exist.

    Raises:
        FileNotFoundError: there is no home directory, or one that cannot be entered. A caller that can do without a
            cache catches it.
    """
    try:
        path = expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "diffusion"
    except ValueError as error:
        raise FileNotFoundError(f"there is no place for a cache: {NO_HOME}; set XDG_CACHE_HOME") from error
    if not _can_be_entered(path):
        raise FileNotFoundError(f"there is no place for a cache: {path} cannot be reached; set XDG_CACHE_HOME")
    return path


def _can_be_entered(directory: Path) -> bool:
    """Whether this user may enter a directory or, if it does not exist, the one in which it would be made."""
    for path in (directory, *directory.parents):
        try:
            return stat.S_ISDIR(os.stat(path).st_mode) and os.access(path, os.X_OK)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            return False
    return False
