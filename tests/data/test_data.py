"""Data sets: the bundled digits, directories that TFDS prepared, and their faults."""

import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn import datasets

from diffusion import data
from diffusion.data import decode, images, prepared


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    """A data_dir in which the digits are prepared, for tests that only read it."""
    root = tmp_path_factory.mktemp("digits")
    prepared.prepare("digits", root)
    return root


@pytest.fixture
def digits_copy(digits_dir, tmp_path):
    shutil.copytree(digits_dir, tmp_path / "data", ignore=shutil.ignore_patterns("decoded-*"))
    return tmp_path / "data"


def write_foreign(root, shape, key="image"):
    """Prepares a set "foreign" of four pictures per split as somebody else's TFDS builder would."""
    size = [length or 5 for length in shape]
    pixels = np.random.default_rng(1).integers(0, 256, (4, *size), np.uint8)

    class Foreign(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("2.1.0")

        def _info(self):
            features = tfds.features.FeaturesDict({key: tfds.features.Image(shape=shape)})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(), "test": self._generate_examples()}

        def _generate_examples(self):
            for index, picture in enumerate(pixels):
                png = io.BytesIO()
                Image.fromarray(picture.squeeze()).save(png, "png")
                yield index, {key: png.getvalue()}

    Foreign(data_dir=root, file_format="array_record").download_and_prepare()
    return pixels


def load_train(name, data_dir):
    return data.load(name, "train", data_dir)


BOTH_USES = [data.describe, load_train]  # they refuse the same things in the same words


# --- the bundled digits


def test_digits_are_scikit_learns(digits_dir):
    original = datasets.load_digits().images.astype(np.uint8)[..., None]
    held_out = np.arange(1797) % 6 == 5
    train, test = (data.load("digits", split, str(digits_dir)) for split in ("train", "test"))
    np.testing.assert_array_equal(train.images, original[~held_out])
    np.testing.assert_array_equal(test.images, original[held_out])
    np.testing.assert_array_equal(test.images[0, ..., 0], datasets.load_digits().images[5])
    assert (len(train.images), len(test.images), train.images.max()) == (1498, 299, 16)
    assert train.num_levels == test.num_levels == 17
    assert (train.name, train.split) == ("digits", "train")


def test_describe_says_before_preparing_what_it_says_after(digits_dir, tmp_path):
    before = data.describe("digits", str(tmp_path / "empty"))
    assert not (tmp_path / "empty").exists()
    assert before == data.describe("digits", str(digits_dir))
    assert before == data.Description("digits", 1498, 299, (8, 8, 1), 17)
    full = data.Description("cifar10", 50_000, 10_000, (32, 32, 3), 256)
    assert data.describe("cifar10", str(tmp_path)) == full


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
        f"print(data.load('digits', 'train', {str(tmp_path)!r}).images.sum());"
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
    assert len(list((tmp_path / "digits" / "1.0.0").glob("decoded-*"))) == 1


def test_losing_the_race_takes_the_winners_result(digits_dir, tmp_path, monkeypatch):
    """The other process finishes between our look and our rename."""
    original = tfds.core.DatasetInfo.write_to_directory

    def overtaken(info, directory):
        shutil.copytree(digits_dir / "digits", tmp_path / "digits", dirs_exist_ok=True)
        original(info, directory)

    monkeypatch.setattr(tfds.core.DatasetInfo, "write_to_directory", overtaken)
    assert prepared.prepare("digits", tmp_path) == tmp_path / "digits" / "1.0.0"
    assert len(data.load("digits", "test", str(tmp_path)).images) == 299
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


# --- the decoded copy


def test_decoded_copy_is_used_and_notices_new_data(digits_copy, monkeypatch):
    first = data.load("digits", "test", str(digits_copy)).images
    directory = digits_copy / "digits" / "1.0.0"
    monkeypatch.setattr(decode, "RECORDS_PER_READ", None)  # decoding again fails
    np.testing.assert_array_equal(data.load("digits", "test", str(digits_copy)).images, first)
    os.utime(directory / "digits-test.array_record-00000-of-00001", (0, 0))
    with pytest.raises(ValueError, match="cannot decode"):
        data.load("digits", "test", str(digits_copy))


@pytest.mark.parametrize("damage", ["cut", "empty", "shape"])
def test_damaged_decoded_copy_is_decoded_anew(digits_copy, damage):
    expected = data.load("digits", "test", str(digits_copy)).images
    (path,) = (digits_copy / "digits" / "1.0.0").glob("decoded-test-*.npy")
    if damage == "shape":
        np.save(path, expected[1:])
    else:
        path.write_bytes(path.read_bytes()[:1000] if damage == "cut" else b"")
    np.testing.assert_array_equal(data.load("digits", "test", str(digits_copy)).images, expected)
    np.testing.assert_array_equal(np.load(path), expected)


def test_read_only_directory_decodes_in_memory(digits_copy, monkeypatch):
    def refuse(*args):
        raise PermissionError("read-only")

    monkeypatch.setattr(decode.os, "replace", refuse)
    assert len(data.load("digits", "test", str(digits_copy)).images) == 299
    assert not list(digits_copy.rglob("decoded-*"))


# --- directories that somebody else prepared


@pytest.mark.parametrize("shape", [(6, 5, 3), (6, 5, 1)])
def test_foreign_set_is_read(tmp_path, shape):
    pixels = write_foreign(tmp_path, shape)
    loaded = data.load("foreign", "train", str(tmp_path))
    np.testing.assert_array_equal(loaded.images, pixels)
    assert loaded.num_levels == 256


def test_newest_version_and_named_version(tmp_path):
    write_foreign(tmp_path, (4, 4, 1))
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
    [((None, None, 3), "image", "one height and width"), ((4, 4, 3), "photo", r"`image`, only \['photo'\]")],
)
def test_unusable_pictures_are_refused(tmp_path, use, shape, key, message):
    write_foreign(tmp_path, shape, key=key)
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
    assert len(data.load("digits", "test", str(digits_copy)).images) == 299


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


def test_too_many_pictures_and_wrong_levels(digits_copy, monkeypatch):
    (digits_copy / "digits" / "1.0.0" / "metadata.json").write_text('{"num_levels": 16}')
    with pytest.raises(ValueError, match="grey level 16, but only 16 levels"):
        data.load("digits", "train", str(digits_copy))
    monkeypatch.setattr(images, "MAX_BYTES", 1498 * 64 - 1)
    with pytest.raises(ValueError, match=r"shape \(1498, 8, 8, 1\), more than"):
        data.load("digits", "train", str(digits_copy))


def test_unwritable_data_dir_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot prepare digits in data\.data_dir=.*that can be written"):
        data.load("digits", "train", str(tmp_path / "file" / "data"))
