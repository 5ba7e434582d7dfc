"""Prepared TFDS directories: preparing and finding them, and their errors."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn import datasets

from diffusion import data
from diffusion.data import tfds as prepared


def load_train(name, data_dir):
    return data.load(name, "train", data_dir)


BOTH_USES = [data.describe, load_train]  # they refuse the same things in the same words


def test_default_directory_is_that_of_tfds(monkeypatch, tmp_path):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in (None, ""):
        assert prepared.resolve_data_dir(unset) == tmp_path / "tensorflow_datasets"
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "elsewhere"))
    assert prepared.resolve_data_dir(None) == tmp_path / "elsewhere"


def test_two_processes_at_once_without_tensorflow(tmp_path):
    """Both prepare, decode and cache the same fresh directory; nothing but progress is on the screen."""
    program = (
        "import sys; from diffusion import data; assert 'tensorflow_datasets' not in sys.modules;"
        f"print(data.load('digits', 'train', {str(tmp_path)!r}).images().sum());"
        "assert 'tensorflow' not in sys.modules"
    )
    command = [sys.executable, "-c", program]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    results = [process.communicate() for process in [subprocess.Popen(command, **pipes) for _ in range(2)]]
    total = datasets.load_digits().images[np.arange(1797) % 6 != 5].sum()
    for stdout, stderr in results:
        assert stdout == f"{total:.0f}\n", stderr
        lines = stderr.replace("\r", "\n").split("\n")
        assert not [line for line in lines if line.strip() and "digits" not in line]
    left = sorted(path.name for path in (tmp_path / "digits").iterdir())
    assert left == ["1.0.0"]
    assert len(list((tmp_path / "digits" / "1.0.0").glob("decoded-*.npy"))) == 1


def test_losing_the_race_takes_the_winners_result(digits_dir, tmp_path, monkeypatch):
    """The other process finishes between our look and our rename."""
    original = tfds.core.DatasetInfo.write_to_directory

    def overtaken(info, directory):
        shutil.copytree(digits_dir / "digits", tmp_path / "digits", dirs_exist_ok=True)
        original(info, directory)

    monkeypatch.setattr(tfds.core.DatasetInfo, "write_to_directory", overtaken)
    assert prepared.prepare("digits", tmp_path) == tmp_path / "digits" / "1.0.0"
    assert len(data.load("digits", "test", str(tmp_path))) == 299
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


def test_newest_version_and_named_version(tmp_path, write_foreign):
    write_foreign((4, 4, 1))
    old = tmp_path / "foreign" / "2.1.0"
    new = tmp_path / "foreign" / "10.0.0"
    shutil.copytree(old, new)
    shutil.copytree(old, tmp_path / "foreign" / "incomplete.ABC_11.0.0")
    assert prepared.find("foreign", tmp_path) == new
    assert prepared.find("foreign:2.1.0", tmp_path) == old
    assert prepared.find("foreign:3.0.0", tmp_path) is None
    shutil.copytree(old, tmp_path / "foreign" / "small" / "1.0.0")
    assert prepared.find("foreign/small", tmp_path) == tmp_path / "foreign" / "small" / "1.0.0"


@pytest.mark.parametrize("use", BOTH_USES)
@pytest.mark.parametrize(
    "shape, key, message",
    [((4, 4, 4), "image", "must have 1 or 3 channels"), ((4, 4, 3), "photo", r"`image`, only \['photo'\]")],
)
def test_unusable_pictures_are_refused(tmp_path, write_foreign, use, shape, key, message):
    write_foreign(shape, key=key)
    with pytest.raises(ValueError, match=message):
        use("foreign", str(tmp_path))


@pytest.mark.parametrize("use", BOTH_USES)
def test_missing_set_says_what_is_there(digits_dir, use):
    with pytest.raises(FileNotFoundError, match=r"data\.name='mnist'.*there: digits.*tfds build mnist"):
        use("mnist", str(digits_dir))
    with pytest.raises(ValueError, match=r"data\.name='\.\./digits' must look like"):
        use("../digits", str(digits_dir))


def test_tfrecord_directory_says_how_to_convert(digits_copy):
    path = digits_copy / "digits" / "1.0.0" / "dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    for use in BOTH_USES:
        with pytest.raises(ValueError, match="stored as tfrecord.*tfds convert_format"):
            use("digits", str(digits_copy))
    # TFDS converts in place and then lists both formats.
    converted = info | {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
    path.write_text(json.dumps(converted))
    assert len(data.load("digits", "test", str(digits_copy))) == 299


def test_missing_split_and_missing_files(digits_copy):
    with pytest.raises(ValueError, match="no split 'validation', only 'train', 'test'"):
        data.load("digits", "validation", str(digits_copy))
    (digits_copy / "digits" / "1.0.0" / "digits-train.array_record-00000-of-00001").unlink()
    with pytest.raises(FileNotFoundError, match="digits-train.array_record.* is missing"):
        data.describe("digits", str(digits_copy))


@pytest.mark.parametrize("kept", [0, 1000])
def test_damaged_record_file_is_named(digits_copy, kept):
    path = digits_copy / "digits" / "1.0.0" / "digits-test.array_record-00000-of-00001"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"cannot decode the test pictures.*1\.0\.0 again"):
        data.load("digits", "test", str(digits_copy))
    assert not list(digits_copy.rglob("decoded-*"))


def test_unwritable_data_dir_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot prepare digits in data\.data_dir=.*that can be written"):
        data.load("digits", "train", str(tmp_path / "file" / "data"))
