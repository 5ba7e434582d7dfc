"""Shards of prepared pictures: record files that worker processes write, each completely or not at all."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import PIL
from PIL import Image
from tqdm import tqdm

from diffusion.data.folder import decoding
from diffusion.data.folder.decoding import Target
from diffusion.data.folder.listing import Picture, Unread
from diffusion.runtime import files

VERSION = "1.0.0"  # of every prepared set
# Shards are small, so that a kill costs little, but few, so that a reader can keep all of them open.
PICTURES_PER_SHARD = 250
MAX_SHARDS = 500


class Recipe(NamedTuple):
    """The settings that all shards of a set share."""

    folder: Path
    target: Target
    classes: tuple[str, ...]


class Shard(NamedTuple):
    """Some pictures of one split, the file of their records, and the file of the report that they are complete."""

    split: str
    pictures: list[Picture]
    records: Path
    report: Path


class Report(NamedTuple):
    """The report on a shard's pictures. `inputs` is a digest of everything that the records depend on."""

    inputs: str
    num_examples: int
    num_bytes: int
    unread: list[Unread]


def divide(pictures: list[Picture], name: str, records: Path, reports: Path) -> list[Shard]:
    """The shards of a set, named as TFDS names them.

    Args:
        records: the folder of the record files.
        reports: the folder of the reports.
    """
    shards = []
    for split in ("train", "test"):
        of_split = [picture for picture in pictures if picture.split == split]
        length = max(PICTURES_PER_SHARD, -(-len(of_split) // MAX_SHARDS))
        begins = range(0, len(of_split), length)
        for number, begin in enumerate(begins):
            file = f"{name}-{split}.array_record-{number:05d}-of-{len(begins):05d}"
            shards.append(Shard(split, of_split[begin : begin + length], records / file, reports / f"{file}.json"))
    return shards


def inputs_digest(shard: Shard, recipe: Recipe) -> str:
    """A digest of everything that a shard's bytes depend on: its pictures, their decoding, the version of Pillow."""
    versions = [PIL.__version__, decoding.VERSION]
    everything = [*versions, dataclasses.asdict(recipe.target), recipe.classes, shard.pictures]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()


def read_report(shard: Shard, recipe: Recipe) -> Report | None:
    """The report of a complete shard; None if the shard is incomplete or was made from other inputs."""
    try:
        report = Report(**json.loads(shard.report.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    if report.inputs != inputs_digest(shard, recipe) or not shard.records.exists():
        return None
    return report._replace(unread=[Unread(*file) for file in report.unread])


def complete(shards: list[Shard], recipe: Recipe, num_workers: int) -> list[Report]:
    """The reports of all shards. Missing shards are written first, with a progress bar.

    Raises:
        ValueError: a picture changed, or could not be read any more, after its digest was taken.
        OSError: a shard could not be written, or a process was killed.
    """
    _remove_others(shards)
    todo = [shard for shard in shards if read_report(shard, recipe) is None]
    total, left = (sum(len(shard.pictures) for shard in some) for some in (shards, todo))
    with tqdm(total=total, initial=total - left, desc="preparing", unit=" pictures", leave=False) as progress:
        for shard in _written(todo, recipe, min(num_workers, len(todo))):
            progress.update(len(shard.pictures))
    return [read_report(shard, recipe) for shard in shards]


def _remove_others(shards: list[Shard]) -> None:
    """Makes the folders of the shards, and deletes files in them of killed processes and of other pictures."""
    wanted = {path for shard in shards for path in (shard.records, shard.report)}
    for folder in {path.parent for path in wanted}:
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            if path not in wanted:
                path.unlink()


def _written(shards: list[Shard], recipe: Recipe, num_workers: int) -> Iterator[Shard]:
    """Each shard once it is written, by this process or by several."""
    if num_workers <= 1:
        for shard in shards:
            write(shard, recipe)
            yield shard
        return
    with _workers(num_workers) as pool:
        with _signals_blocked():  # processes start when needed, and inherit the blocked signals
            futures = {pool.submit(write, shard, recipe): shard for shard in shards}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BrokenProcessPool as error:
            raise OSError(
                "a worker process was killed, perhaps because memory ran out; give the same command again, "
                "with fewer --workers"
            ) from error


@contextlib.contextmanager
def _workers(number: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end at once when this one leaves the block or ends, however it ends."""
    context = multiprocessing.get_context("spawn")  # a forked one would inherit locks that other threads hold
    receiver, sender = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(number, context, initializer=_end_with, initargs=(receiver,))
    try:
        yield pool
    finally:
        sender.close()
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Blocks SIGINT and SIGTERM. If a whole process group gets them, only the main process handles them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with(receiver: Connection) -> None:
    """Ends this process once the other end of the pipe, which only the main process holds, is closed."""

    def watch() -> None:
        receiver.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def write(shard: Shard, recipe: Recipe) -> None:
    """Writes the record file of a shard and then its report, each completely or not at all.

    Raises:
        ValueError: a picture changed, or could not be read any more, after its digest was taken.
        OSError: a file could not be written.
    """
    from tensorflow_datasets.core import file_adapters

    lengths, unread = [], []

    def records() -> Iterator[tuple[str, bytes]]:
        for picture in shard.pictures:
            try:
                record = _record(picture, recipe)
            except decoding.Unreadable as error:
                unread.append(Unread(picture.path, str(error)))
                continue
            lengths.append(len(record))
            yield picture.path, record

    with files.replacing(shard.records) as file:
        try:
            # It opens the same file once more, by its name.
            file_adapters.ArrayRecordFileAdapter.write_examples(file.name, records())
        except RuntimeError as error:  # ArrayRecord's way to say that the disk is full
            raise OSError(str(error)) from error
    report = Report(inputs_digest(shard, recipe), len(lengths), sum(lengths), unread)
    files.write_text(shard.report, json.dumps(report._asdict()))


def _record(picture: Picture, recipe: Recipe) -> bytes:
    """A picture as an example, serialized. Raises what `write` raises, and Unreadable."""
    import tensorflow_datasets as tfds

    try:
        data = (recipe.folder / picture.path).read_bytes()
    except OSError as error:
        # Not as an OSError: `replacing` would say that the shard could not be written.
        raise ValueError(f"{picture.path} could not be read any more ({error.strerror})") from error
    if hashlib.sha256(data).hexdigest() != picture.sha256:
        raise ValueError(f"{picture.path} changed meanwhile; give the same command again")
    pixels = decoding.to_pixels(data, recipe.target)
    png = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if recipe.target.channels == 1 else pixels).save(png, "png")
    example = {"image": png.getvalue(), "file": os.fsencode(picture.path)}
    if recipe.classes:
        example["label"] = picture.label
    features = _features(recipe)
    serializer = tfds.core.ExampleSerializer(features.get_serialized_info())
    # Without this, the order of image, file and label would differ between processes.
    return serializer.get_tf_example(features.encode_example(example)).SerializeToString(deterministic=True)


@functools.lru_cache(maxsize=1)
def _features(recipe: Recipe):
    """The tfds.features.FeaturesDict of the records: image, file, and label where there are classes."""
    # TFDS takes a second to import, which the command's --help should not cost.
    import tensorflow_datasets as tfds

    types = {
        "image": tfds.features.Image(shape=recipe.target.shape, encoding_format="png"),
        "file": tfds.features.Text(),
    }
    if recipe.classes:
        types["label"] = tfds.features.ClassLabel(names=list(recipe.classes))
    return tfds.features.FeaturesDict(types)


def write_metadata(shards: list[Shard], reports: list[Report], recipe: Recipe, metadata: dict[str, Any]) -> None:
    """Writes the files beside the records, so that TFDS can read their folder.

    Args:
        metadata: further entries for metadata.json.
    """
    import tensorflow_datasets as tfds

    folder, splits = shards[0].records.parent, []
    for split in ("train", "test"):
        of_split = [report for shard, report in zip(shards, reports, strict=True) if shard.split == split]
        lengths, sizes = [report.num_examples for report in of_split], [report.num_bytes for report in of_split]
        splits.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=sum(sizes)))
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        version=VERSION,
        features=_features(recipe),
        split_infos=splits,
        description="A folder of pictures, prepared by python -m diffusion.data.folder.",
        metadata=tfds.core.MetadataDict(metadata),
        disable_shuffling=True,
        check_data=False,  # that would need TensorFlow
    )
    for path in folder.iterdir():  # as `files.replacing` does: a power failure must not leave empty files
        with path.open("rb") as file:
            os.fsync(file.fileno())
