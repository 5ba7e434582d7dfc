"""Files from a server: complete and as they should be, or not there."""

import hashlib
import os
import urllib.request
from pathlib import Path

from tqdm import tqdm

from diffusion.runtime import files, preemption

BLOCK_BYTES = 1 << 20


def download(url: str, sha256: str, path: Path, num_bytes: int | None = None) -> None:
    """Downloads `url` to `path`, which appears only once complete and with the right SHA-256.

    Args:
        num_bytes: the right size, where it is known; a server that announces another is not read.

    Raises:
        ValueError: the server sent something else.
        OSError: the server or the disk failed; a ConnectionError if the download was cut.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = files.unfinished(path, "partial")
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=60) as response, partial.open("wb") as file:
            announced = int(response.headers["Content-Length"] or 0) or num_bytes
            if num_bytes not in (None, announced):
                raise ValueError(f"{url} has {announced} bytes, not {num_bytes}: nothing was kept")
            with tqdm(total=announced, desc=f"downloading {path.name}", unit="B", unit_scale=True) as progress:
                while block := response.read(BLOCK_BYTES):
                    preemption.point()
                    file.write(block)
                    digest.update(block)
                    progress.update(len(block))
            if announced is not None and file.tell() != announced:
                raise ConnectionError(f"{url} broke off after {file.tell()} of {announced} bytes: try again")
            file.flush()
            os.fsync(file.fileno())  # or a power failure could leave the name and nothing in the file
        found = digest.hexdigest()
        if found != sha256:
            raise ValueError(f"{url} sent SHA-256 {found}, not {sha256}: nothing was kept, try again")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
