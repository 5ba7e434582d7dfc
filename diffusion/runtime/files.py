"""Files that are written completely or not at all, and where files lie that can be made again."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file open for writing that takes the place of `path` once all is in it.

    Until then, and if anything is raised meanwhile, `path` stays what it was. Several processes may do it at once;
    the last one wins.

    Raises:
        OSError: the file could not be written; the message names it.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
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


def write_text(path: Path, text: str) -> None:
    """Writes a text file, completely or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/diffusion`, or ~/.cache/diffusion; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diffusion"
