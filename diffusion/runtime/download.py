"""Downloads of files: complete and correct, or not there."""

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
import urllib.response
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from diffusion.runtime import files, preemption

BLOCK_BYTES = 1 << 20
SLOW_BYTES, SLOW_SECONDS = 2**18, 60.0  # a second; a server that was slower for so long is left, if there is another
NOT_SATISFIABLE = 416  # the answer of a server that has no bytes from there on


def download(urls: str | Sequence[str], sha256: str, path: Path, num_bytes: int | None = None) -> None:
    """Downloads a file to `path`, which appears only once complete and with the right SHA-256.

    If a download is cut, its first part is kept beside `path`. The next call or the next server continues from there.
    If several processes call it, one downloads and the others wait.

    Args:
        urls: the addresses of the file, in the order in which they are tried.
        num_bytes: the right size, if known. A server that announces another size is not read.

    Raises:
        ValueError: a server sent another file.
        OSError: the servers or the disk failed; a ConnectionError if the download was cut.
    """
    urls = [urls] if isinstance(urls, str) else urls
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = f"waiting for another process, which downloads {path.name}"
    with files.alone(path.with_name(f"{path.name}.partial"), waiting) as file:
        partial = Path(file.name)
        if path.exists() and _sha256(path) == sha256:  # by the process that was waited for
            return partial.unlink()
        for number, url in enumerate(urls):
            try:
                _append(url, file, path.name, num_bytes, is_last=number == len(urls) - 1)
                if (found := _sha256(partial)) != sha256:
                    file.truncate(0)
                    raise ValueError(f"{url} sent SHA-256 {found}, not {sha256}: nothing was kept, try again")
                break
            except (OSError, ValueError):
                if number == len(urls) - 1:
                    if os.fstat(file.fileno()).st_size == 0:
                        partial.unlink(missing_ok=True)
                    raise
        os.fsync(file.fileno())  # or a power failure could leave the name and nothing in the file
        os.replace(partial, path)


def _append(url: str, file: BinaryIO, name: str, num_bytes: int | None, is_last: bool) -> None:
    """Reads what the file lacks, or all of it where the server does not send a part."""
    begin = os.fstat(file.fileno()).st_size
    request = urllib.request.Request(url, headers={"Range": f"bytes={begin}-"} if begin else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if begin and error.code == NOT_SATISFIABLE:  # it is there as a whole, or it is another file
            return
        raise
    with response:
        if begin and response.headers["Content-Range"] is None:
            file.truncate(begin := 0)
        announced = begin + int(response.headers["Content-Length"] or 0)
        announced = announced if announced > begin else num_bytes
        if num_bytes not in (None, announced):
            raise ValueError(f"{url} has {announced} bytes, not {num_bytes}: nothing was kept")
        with tqdm(total=announced, initial=begin, desc=f"downloading {name}", unit="B", unit_scale=True) as progress:
            since, bytes_since = time.monotonic(), 0
            while block := _read(response, url):
                preemption.point()
                file.write(block)
                progress.update(len(block))
                bytes_since += len(block)
                if (seconds := time.monotonic() - since) > SLOW_SECONDS:
                    if not is_last and bytes_since < SLOW_BYTES * seconds:
                        file.flush()
                        raise ConnectionError(f"{url} sends {bytes_since / seconds / 1000:.0f} kB/s")
                    since, bytes_since = time.monotonic(), 0
        file.flush()
        size = os.fstat(file.fileno()).st_size
        if announced is not None and size != announced:
            raise ConnectionError(f"{url} broke off after {size} of {announced} bytes: try again")


def _read(response: http.client.HTTPResponse | urllib.response.addinfourl, url: str) -> bytes:
    try:
        return response.read(BLOCK_BYTES)
    except http.client.HTTPException as error:  # such as a part that breaks off, of a server that sends parts
        raise ConnectionError(f"{url} broke off ({error}): try again") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
