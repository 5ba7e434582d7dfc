"""The pictures in a folder: finds and hashes every file, and assigns every picture to a split."""

import errno
import hashlib
import json
import os
import stat
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"}
TEST_FOLDERS = ("test", "val", "valid", "validation")
MAX_FILE_BYTES = 2**30  # a file is read at once, and no picture that Pillow opens needs more
FILES_PER_BATCH = 1000

# Errors that are one file's own fault. Any other, such as EIO, says that the disk or the network is at fault.
# A link may lead through a file (ENOTDIR) or name a path that is too long.
_FILE_FAULTS = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG)


class File(NamedTuple):
    """A file, by its path in the folder with "/" between the parts."""

    path: str
    num_bytes: int
    mtime_ns: int


class Unread(NamedTuple):
    """A picture that cannot be read, and why."""

    path: str
    reason: str


class Found(NamedTuple):
    """All files of a folder, each in one of the lists and each list in the order of the paths."""

    pictures: list[File]
    unread: list[Unread]
    others: list[str]


class Picture(NamedTuple):
    """A picture with its split, "train" or "test", and its class, None in a set without labels."""

    path: str
    sha256: str
    split: str
    label: str | None


def scan(folder: Path, leave_out: Iterable[Path] = ()) -> Found:
    """Finds the files of a folder and of all folders in it. Links are followed.

    A picture is a file with one of EXTENSIONS, in upper or lower case, that is not hidden. Names that are not valid
    UTF-8 come with surrogates, as `os.fsdecode` makes them.

    Args:
        leave_out: folders to skip if they are in `folder`.

    Raises:
        ValueError: `folder` is not a folder.
        OSError: the disk failed.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    found = Found([], [], [])
    passed_over = {_identity(path.stat()) for path in leave_out if path.exists()}
    pending = [("", [_identity(folder.stat())])]  # folders to look into, with the identities of those they lie in
    while pending:
        prefix, above = pending.pop()
        try:
            names = os.listdir(folder / prefix)
        except OSError as error:
            found.unread.append(Unread(prefix or ".", _reason(error)))
            continue
        for path in (prefix + name for name in names):
            status = _add(path, folder, found)
            if status is None or not stat.S_ISDIR(status.st_mode):
                continue
            if _identity(status) in above:  # a link to a folder above it would never end
                found.others.append(f"{path}/")
            elif _identity(status) not in passed_over:
                pending.append((f"{path}/", [*above, _identity(status)]))
    for files in found:
        files.sort()
    return found


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _add(path: str, folder: Path, found: Found) -> os.stat_result | None:
    """Puts a file into its list, and a folder into none. Returns its status, or None if it has none."""
    is_picture = os.path.splitext(path)[1].lower() in EXTENSIONS and not _is_hidden(path)
    try:
        status = os.stat(folder / path)
    except OSError as error:
        reason = _reason(error)
        if is_picture:
            found.unread.append(Unread(path, reason))
        else:
            found.others.append(path)
        return None
    if stat.S_ISREG(status.st_mode) and is_picture:
        if status.st_size > MAX_FILE_BYTES:
            found.unread.append(Unread(path, f"it is larger than {MAX_FILE_BYTES / 2**30:g} GiB"))
        else:
            found.pictures.append(File(path, status.st_size, status.st_mtime_ns))
    elif not stat.S_ISDIR(status.st_mode):
        found.others.append(path)
    return status


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _reason(error: OSError) -> str:
    """Why one file cannot be read. Raises the error again if it says nothing about the file."""
    if error.errno not in _FILE_FAULTS:
        raise error
    return error.strerror


# --- Contents


def content_digests(folder: Path, files: list[File], cache: Path) -> tuple[dict[str, str], list[Unread]]:
    """The SHA-256 digests of the files by path, and the files that cannot be read.

    Digests are kept in `cache`, one per line, so an interrupted call continues where it was. A kept digest is valid
    while the file's size and time do not change.

    Raises:
        OSError: the disk failed.
    """
    known = _read_cache(cache)
    digests = {file.path: known[file] for file in files if file in known}
    todo = [file for file in files if file not in known]
    unread = []
    progress = tqdm(total=len(files), initial=len(digests), desc="hashing", unit=" files", leave=False)
    with progress, cache.open("a") as lines, ThreadPoolExecutor() as threads:
        for begin in range(0, len(todo), FILES_PER_BATCH):
            batch = todo[begin : begin + FILES_PER_BATCH]
            for file, digest in zip(batch, threads.map(_digest, [folder / file.path for file in batch]), strict=True):
                if isinstance(digest, OSError):
                    unread.append(Unread(file.path, _reason(digest)))
                    continue
                digests[file.path] = digest
                lines.write(json.dumps([*file, digest]) + "\n")
            lines.flush()
            progress.update(len(batch))
    return digests, unread


def _digest(path: Path) -> str | OSError:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return error


def _read_cache(path: Path) -> dict[File, str]:
    """The kept digests. Damaged lines, such as one that was cut off by a kill, are ignored."""
    known = {}
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                *file, digest = json.loads(line)
                known[File(*file)] = digest
            except (ValueError, TypeError):
                continue
    return known


# --- Splits


def split_folders(paths: list[str], folder: Path) -> dict[str, str]:
    """The top-level folders that are splits: {"train": "train", "val": "test"}; empty if there are none.

    Args:
        paths: the paths of all pictures.
        folder: the folder to name in messages.

    Raises:
        ValueError: there is only one of the two splits, there are two test folders, or a picture is outside of both.
    """
    tops = {path.split("/")[0] for path in paths if "/" in path}
    train = sorted(top for top in tops if top.lower() == "train")
    test = sorted(top for top in tops if top.lower() in TEST_FOLDERS)
    if not (train and test):
        at_the_top = [path for path in paths if "/" not in path]
        if len(tops) == 1 and not at_the_top and train + test:
            raise ValueError(
                f"{folder} has pictures in {tops.pop()}/ only: put others into {'test' if train else 'train'}/, "
                "or name that folder itself to split it by content"
            )
        return {}
    if len(train) > 1 or len(test) > 1:
        names = "/, ".join(test if len(test) > 1 else train)
        raise ValueError(f"{folder} has {names}/, but a set has one train and one test split: move one of them away")
    splits = {train[0]: "train", test[0]: "test"}
    outside = [path for path in paths if path.split("/")[0] not in splits]
    if outside:
        raise ValueError(
            f"{len(outside):,} of {len(paths):,} pictures lie outside of {train[0]}/ and {test[0]}/, for example "
            f"{outside[0]}: move them into one of the two, or rename these folders to split by content"
        )
    return splits


def with_splits(
    digests: dict[str, str], label_of: dict[str, str], splits: dict[str, str], test_fraction: float | None
) -> list[Picture]:
    """The pictures in the order of their paths, each with its split and its label.

    Args:
        digests: the SHA-256 of each picture.
        label_of: empty for a set without labels.
        splits: the top-level folders that are splits. If there are none, `test_fraction` and the content decide.
    """
    pictures = []
    for path in sorted(digests):
        sha256 = digests[path]
        if splits:
            split = splits[path.split("/")[0]]
        else:
            split = "test" if is_test(sha256, test_fraction) else "train"
        pictures.append(Picture(path, sha256, split, label_of.get(path)))
    return pictures


def is_test(sha256: str, test_fraction: float) -> bool:
    """Whether a picture belongs to the test split. Only its content decides, so new pictures do not move it."""
    return int(sha256[:16], 16) / 2**64 < test_fraction


def in_both_splits(pictures: list[Picture]) -> list[tuple[str, str]]:
    """Pairs of a train and a test picture of equal content, one pair per content."""
    by_content = defaultdict(dict)
    for picture in pictures:
        by_content[picture.sha256].setdefault(picture.split, picture.path)
    return [(paths["train"], paths["test"]) for paths in by_content.values() if len(paths) == 2]


def fingerprint(pictures: list[Picture]) -> str:
    """One digest of all paths, contents, splits and labels."""
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(json.dumps(picture).encode() + b"\n")
    return digest.hexdigest()
