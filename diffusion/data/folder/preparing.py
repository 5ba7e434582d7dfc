"""From a folder of pictures to a data set: the plan, the obstacles, and the steps."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from diffusion.data.folder import labels, listing, shards
from diffusion.data.folder.decoding import Target
from diffusion.data.folder.listing import Found, Picture, Unread
from diffusion.data.folder.shards import VERSION, Recipe
from diffusion.runtime import files

TEST_FRACTION = 0.05
MAX_NAME = 200  # letters: TFDS adds some to the names of record files
SHOWN = 5  # how many names a message shows, of many


class UnreadFiles(ValueError):
    """Some files cannot be read. Everything else is done and kept."""

    def __init__(self, unread: list[Unread], num_files: int):
        super().__init__(
            f"cannot read {len(unread):,} of {num_files:,} pictures; repair or remove these files, or give the same "
            "command with --skip-bad to leave them out"
        )
        self.unread = unread


def place(name: str, data_dir: str | None) -> Path:
    """The directory of the set: DATA_DIR/NAME/1.0.0.

    Raises:
        ValueError: the name is not allowed or belongs to another set, or `data_dir` is a URL.
    """
    # TFDS takes a second to import, which --help should not cost.
    from diffusion.data import tfds

    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise ValueError(f"--name={name} must begin with a small letter and have only small letters, digits and _")
    if len(name) > MAX_NAME:
        raise ValueError(f"--name={name[:20]}… has {len(name)} letters, but names of files have room for {MAX_NAME}")
    if tfds.is_own(name):
        raise ValueError(f"--name={name} is the name of a built-in data set; take another --name")
    root = tfds.resolve_data_dir(data_dir)
    directory, newest = root / name / VERSION, tfds.find(name, root)
    if newest not in (None, directory):
        raise ValueError(f"--name={name} is the name of the data set in {newest}; take another --name")
    return directory


def _staging(directory: Path) -> Path:
    """The folder in which the set is made. It does not look like a version of the set."""
    return directory.with_name(f"incomplete-{directory.name}")


class Plan(NamedTuple):
    """The plan for a folder.

    Attributes:
        recipe: the folder, the form that every picture gets, and the classes.
        found: the files.
        splits: the top-level folders that are splits; empty if the content decides.
        label_of: the class of each picture; empty in a set without labels.
        settings: all settings, as JSON.
    """

    recipe: Recipe
    found: Found
    splits: dict[str, str]
    label_of: dict[str, str]
    settings: dict[str, Any]


def plan(
    folder: Path,
    directory: Path,
    target: Target,
    wanted_labels: str | None = None,
    test_fraction: float | None = None,
) -> Plan:
    """Finds the pictures, their splits and their labels.

    Args:
        directory: the set's own directory. Its files do not count if it is in `folder`.
        wanted_labels: "folders", "none" or a file's name; None for "folders" if every picture lies in one.
        test_fraction: None for TEST_FRACTION, or if folders are the splits.

    Raises:
        ValueError: there are no pictures, or the splits or labels do not fit them.
        OSError: the disk failed.
    """
    if test_fraction is not None and not 0 < test_fraction < 1:
        raise ValueError(f"--test-fraction={test_fraction} must lie between 0 and 1")
    found = listing.scan(folder, leave_out=[directory, _staging(directory)])
    paths = [file.path for file in found.pictures]
    if not paths:
        raise ValueError(f"{folder} has no pictures: files that end in {', '.join(sorted(listing.EXTENSIONS))}")
    splits = listing.split_folders(paths, folder)
    if splits and test_fraction is not None:
        raise ValueError(f"--test-fraction has no effect where the folders {', '.join(splits)} are the splits")
    kind, label_of = labels.find_labels(wanted_labels, paths, splits, [file.path for file in found.unread])
    settings = {
        **dataclasses.asdict(target),
        "background": list(target.background),
        "labels": kind,
        "test_fraction": None if splits else test_fraction or TEST_FRACTION,
    }
    recipe = Recipe(folder, target, tuple(labels.class_names(label_of.values())))
    return Plan(recipe, found, splits, label_of, settings)


def prepare(plan: Plan, directory: Path, skip_bad: bool = False, num_workers: int = 1) -> list[Unread]:
    """Prepares a set. `directory` appears when all is done. Until then finished work is kept beside it.

    Returns:
        The files that cannot be read and are left out; none if the set was prepared before.

    Raises:
        UnreadFiles: some files cannot be read, and `skip_bad` is false.
        ValueError: a split is empty, there is too little room, a picture changed meanwhile, or the existing set has
            other settings or is damaged.
        OSError: the disk failed, or a process was killed.
    """
    staging, recipe = _staging(directory), plan.recipe
    with _occupied(staging):
        _refuse_other_settings(plan.settings, directory, staging)
        digests, unread = listing.content_digests(recipe.folder, plan.found.pictures, staging / "digests.jsonl")
        pictures = listing.with_splits(digests, plan.label_of, plan.splits, plan.settings["test_fraction"])
        files_sha256 = listing.fingerprint(pictures)
        if directory.exists():
            shutil.rmtree(staging)
            if _metadata(directory).get("files_sha256") != files_sha256:
                raise ValueError(f"{directory} was made from other files; take another --name, or delete it")
            print(f"{directory} is prepared already")
            return []
        _announce(plan, pictures, directory)
        _refuse_empty_split(pictures)
        _refuse_too_little_room(_decoded_bytes(pictures, recipe), staging)
        files.write_text(staging / "settings.json", json.dumps(plan.settings))
        parts = shards.divide(pictures, directory.parent.name, staging / "data", staging / "reports")
        reports = shards.complete(parts, recipe, num_workers)
        unread = sorted([*plan.found.unread, *unread, *(file for report in reports for file in report.unread)])
        if unread and not skip_bad:
            raise UnreadFiles(unread, len(plan.found.pictures) + len(plan.found.unread))
        left_out = {file.path for file in unread}
        pictures = [picture for picture in pictures if picture.path not in left_out]
        _refuse_empty_split(pictures)
        metadata = {"num_levels": 256, "settings": plan.settings, "files_sha256": files_sha256}
        shards.write_metadata(parts, reports, recipe, metadata)
        os.rename(staging / "data", directory)
        shutil.rmtree(staging)
    counts = _split_counts(pictures)
    print(
        f"prepared: {counts['train']:,} train, {counts['test']:,} test; left out: "
        f"{len(unread):,} that cannot be read, other files: {len(plan.found.others):,}"
    )
    return unread


@contextlib.contextmanager
def _occupied(staging: Path) -> Iterator[None]:
    """`files.locked`. The folder is deleted if nothing was put into it."""
    with files.locked(staging, "wait for it, or stop it"):
        try:
            yield
        finally:
            if staging.exists() and os.listdir(staging) == [files.LOCK]:
                shutil.rmtree(staging)


def _refuse_other_settings(settings: dict[str, Any], directory: Path, staging: Path) -> None:
    """Raises a ValueError if the finished set, or what an interrupted call left, has other settings."""
    if directory.exists():
        where, advice = directory, "take another --name, or delete it"
        there = _metadata(directory).get("settings")
        if there is None:
            raise ValueError(f"{directory} was not made by this command; take another --name")
    else:
        where, advice = staging, "give those again, or delete it"
        there = _read_json(staging / "settings.json", "delete this file and give the same command again") or settings
    differing = [f"{key}: {there.get(key)}, now {value}" for key, value in settings.items() if there.get(key) != value]
    if differing:
        raise ValueError(f"{where} was made with other settings ({'; '.join(differing)}); {advice}")


def _metadata(directory: Path) -> dict[str, Any]:
    return _read_json(directory / "metadata.json", f"take another --name, or delete {directory}")


def _read_json(path: Path, advice: str) -> dict[str, Any]:
    """The object in a JSON file, {} without a file. Raises a ValueError that ends with `advice` if it is damaged."""
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {advice}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (it has no object); {advice}")
    return found


def _split_counts(pictures: list[Picture]) -> Counter:
    return Counter(picture.split for picture in pictures)


def _refuse_empty_split(pictures: list[Picture]) -> None:
    for split in ("train", "test"):
        if not _split_counts(pictures)[split]:
            raise ValueError(
                f"none of {len(pictures):,} pictures is in the {split} split; add pictures, give another "
                "--test-fraction, or sort the pictures into the folders train and test"
            )


def _decoded_bytes(pictures: list[Picture], recipe: Recipe) -> int:
    return len(pictures) * math.prod(recipe.target.shape)


def _refuse_too_little_room(needed: int, staging: Path) -> None:
    made = sum(path.stat().st_size for path in (staging / "data").glob("*"))
    free = shutil.disk_usage(staging).free
    if needed > free + made:
        raise ValueError(
            f"the pictures take up to {_size(needed)}, but {staging.parent} has room for {_size(free)}; "
            "make room, or give another --data-dir or a smaller --size"
        )


def _announce(plan: Plan, pictures: list[Picture], directory: Path) -> None:
    """Prints the files that were found and the set that they make."""
    found, counts = plan.found, _split_counts(pictures)
    others = f" ({_some(found.others)})" if found.others else ""
    print(f"files: {len(found.pictures) + len(found.unread):,} pictures, other files: {len(found.others):,}{others}")
    print(_labels_line(plan))
    print(f"splits: {counts['train']:,} train, {counts['test']:,} test")
    if plan.splits and (pairs := listing.in_both_splits(pictures)):
        equal = _some([f"{train} = {test}" for train, test in pairs])
        print(f"warning: {len(pairs):,} pictures are in both splits ({equal})")
    shape, size = "x".join(map(str, plan.recipe.target.shape)), _size(_decoded_bytes(pictures, plan.recipe))
    print(f"result: {len(pictures):,} pictures of {shape}, {size} decoded, in {directory}", flush=True)


def _labels_line(plan: Plan) -> str:
    """A line about the classes. If there are none, it counts the pictures that lie in no folder."""
    classes, paths = plan.recipe.classes, [file.path for file in plan.found.pictures]
    if classes:
        return f"labels: {len(classes):,} classes ({_some(classes)})"
    in_folders = labels.folder_labels(paths, plan.splits)
    if not in_folders or len(in_folders) == len(paths):  # nothing to choose, or it was chosen
        return "labels: none"
    outside = [path for path in paths if path not in in_folders]
    return f"labels: none; {len(outside):,} of {len(paths):,} pictures lie in no folder ({_some(outside)})"


def _size(num_bytes: int) -> str:
    return tqdm.format_sizeof(num_bytes, "B")


def _some(names: Sequence[str]) -> str:
    text = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return " ".join(text.split())  # the name of a file may hold line ends
