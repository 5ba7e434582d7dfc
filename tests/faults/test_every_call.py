"""The disk fails at each call that opens, syncs or renames a file in turn: one line, and nothing is lost.

The same work again, without the fault, ends with the bytes of the undisturbed one. Orbax's own calls are not among
the failing ones: test_io_errors.py and disk_full.py break those.
"""

import builtins
import errno
import hashlib
import os
import pathlib
import shutil

import numpy as np
import pytest
from test_damaged_results import MODEL, Drawer

from diffusion import data
from diffusion.data import decoded, stored_split, unfinished
from diffusion.evaluation import kept
from diffusion.evaluation.features import Batch, Features
from diffusion.programs import sample
from diffusion.reporting import summary
from diffusion.reporting.metrics_log import MetricsLog
from diffusion.runtime import coded_file
from diffusion.runtime.download import download

CONTENT = bytes(range(256)) * 400
HEADER = coded_file.Header(
    b"wwww", b"cccc", "cpu", "0.10.1", b"ffff", 0, 16, 4, 3, 2, 2, 1, 17, b"pppp", 2
)  # fmt: skip


def draws(directory):
    sample._fill(Drawer(), MODEL, directory, 9, None)


def scores(directory):
    terms = kept.on_disk(directory / "unfinished" / "test.npy", (2, 3, 4))
    terms[np.isnan(terms)] = 1.0
    terms.flush()
    summary.write_json(directory / "eval.json", {"test_bpd": float(terms.sum())})


def measures(directory):
    def extract(images):
        return Batch(images.reshape(len(images), -1) / 2, np.zeros((len(images), 2)))

    features = Features(extract, sha256="ab")
    list(features.batches(np.ones((3, 2, 2, 1), np.uint8), directory))


def codes(directory):
    coded_file.write(directory / "images.ddc", HEADER, np.arange(9, dtype=np.uint32))
    coded_file.read(directory / "images.ddc")


def logs(directory):
    with MetricsLog(directory) as log:
        for step in range(1, 4):
            log.write(step, loss=1 / step)


def decodes(directory):
    data.load("digits", "test", str(directory))


def downloads(directory):
    source = directory.parent / "source"
    source.write_bytes(CONTENT)
    download(source.as_uri(), hashlib.sha256(CONTENT).hexdigest(), directory / "file")


class Disk:
    """Fails at the call with a number, of those that concern a directory."""

    def __init__(self, directory, fails_at, code):
        self.directory, self.fails_at, self.code, self.calls = str(directory), fails_at, code, 0

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for owner, name in ((os, "replace"), (builtins, "open"), (pathlib.Path, "open"), (os, "open")):
            self.patch.setattr(owner, name, self.failing(getattr(owner, name)))
        fsync = os.fsync
        self.patch.setattr(os, "fsync", lambda file: fsync(file) if self.passes() else None)
        return self

    def __exit__(self, *exception):
        self.patch.undo()

    def passes(self):
        self.calls += 1
        if self.calls == self.fails_at:
            raise OSError(self.code, os.strerror(self.code))
        return True

    def failing(self, real):
        def call(path, *args, **kwargs):
            if self.directory in str(path):
                self.passes()
            return real(path, *args, **kwargs)

        return call


def contents(directory):
    """Every file, but for the one that spares a copy of a set another decoding, and which need not be there."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.suffix != ".records"]
    found = {path.relative_to(directory): path for path in files}
    return {str(name): path.read_bytes() for name, path in found.items()}


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize(
    "work", [draws, scores, measures, codes, logs, downloads, pytest.param(decodes, marks=pytest.mark.slow)]
)
def test_a_fault_is_one_line_and_the_same_work_ends_as_without_it(work, code, tmp_path, monkeypatch, tiny_data_dir):
    monkeypatch.setattr(sample, "SHARD_IMAGES", 4)
    monkeypatch.setattr(stored_split, "RECORDS_PER_READ", 100)
    monkeypatch.setattr(unfinished, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(decoded.tempfile, "TemporaryFile", None)

    def begin(name):
        directory = tmp_path / name
        if work is decodes:
            ignored = shutil.ignore_patterns("decoded-*", "classes-*")
            shutil.copytree(tiny_data_dir, directory, ignore=ignored)
        else:
            directory.mkdir()
        return directory

    straight = begin("straight")
    with Disk(straight, 0, code) as disk:
        work(straight)
    num_calls, faults = disk.calls, 0
    for number in range(1, num_calls + 1):
        directory = begin(f"fault{number}")
        try:
            with Disk(directory, number, code):
                work(directory)
        except OSError as error:
            faults += 1
            assert os.strerror(code) in str(error) and "\n" not in str(error)
        work(directory)
        assert contents(directory) == contents(straight), number
        shutil.rmtree(directory)
    assert num_calls >= 2 and faults >= num_calls // 2
    print(f"{work.__name__}: {faults} of {num_calls} faults are told")
