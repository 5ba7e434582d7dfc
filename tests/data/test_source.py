"""Data sets: the bundled digits with their labels, sets of other builders, and decoded copies."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil

import numpy as np
import pytest
from sklearn import datasets

from diffusion import data
from diffusion.data import Source, decoded, places, stored_split

HELD_OUT = np.arange(1797) % 6 == 5


def load(split, directory):
    return data.load("digits", split, str(directory))


def test_digits_are_scikit_learns(digits_dir):
    original = datasets.load_digits()
    pixels = original.images.astype(np.uint8)[..., None]
    train, test = load("train", digits_dir), load("test", digits_dir)
    for split, chosen in ((train, ~HELD_OUT), (test, HELD_OUT)):
        np.testing.assert_array_equal(split.images(), pixels[chosen])
        np.testing.assert_array_equal(split.labels(), original.target[chosen])
        assert (split.num_levels, split.num_classes, split.image_shape) == (17, 10, (8, 8, 1))
    np.testing.assert_array_equal(test.images()[0, ..., 0], original.images[5])
    assert (len(train), len(test), train.images().max()) == (1498, 299, 16)
    assert (train.name, train.split, train.split_number, test.split_number) == ("digits", "train", 0, 1)


def test_examples_are_taken_by_index_or_slice_and_all_of_them_without_a_copy(digits_dir):
    test, indices = load("test", digits_dir), np.array([7, 0, 7, 298])
    images, labels = test.images(indices), test.labels(indices)
    assert (images.shape, images.dtype, labels.dtype) == ((4, 8, 8, 1), np.uint8, np.int32)
    for i, index in enumerate(indices):
        np.testing.assert_array_equal(images[i], test.images()[index])
        assert labels[i] == test.labels()[index]
    np.testing.assert_array_equal(test.images(slice(3, 5)), test.images()[3:5])
    np.testing.assert_array_equal(test.labels(slice(3, 5)), test.labels()[3:5])
    assert np.shares_memory(test.images(), test.pixels)


def test_describe_says_before_preparing_what_it_says_after(digits_dir, tmp_path):
    before = data.describe("digits", str(tmp_path / "empty"))
    assert not (tmp_path / "empty").exists()
    assert before == data.describe("digits", str(digits_dir))
    assert before == data.Description("digits", 1498, 299, (8, 8, 1), 17, 10)
    full = data.Description("cifar10", 50_000, 10_000, (32, 32, 3), 256, 10)
    assert data.describe("cifar10", str(tmp_path)) == full


@pytest.mark.parametrize("shape", [(6, 5, 3), (6, 5, 1)])
def test_a_set_without_labels_is_read_and_refuses_labels(tmp_path, write_foreign, shape):
    pixels = write_foreign(shape)
    loaded = data.load("foreign", "train", str(tmp_path))
    np.testing.assert_array_equal(loaded.images(), pixels)
    assert (loaded.num_levels, loaded.num_classes) == (256, 0)
    assert data.describe("foreign", str(tmp_path)).num_classes == 0
    with pytest.raises(ValueError, match="data.name='foreign' has no labels"):
        loaded.labels(np.arange(2))


@pytest.mark.parametrize("wrong", [-1, 3, 1000])
def test_a_label_that_is_none_of_the_classes_is_refused_unless_it_is_asked_for(wrong):
    """TFDS writes −1 for an unknown label, which a network would take for "no label"."""
    classes = np.array([0, 2, wrong, 1, wrong], np.int32)
    source = Source("cats", "test", np.zeros((5, 2, 2, 1), np.uint8), classes=classes, num_classes=3)
    with pytest.raises(ValueError, match=rf"'cats': 2 of 5 labels of the test split are not in 0…2, .* {wrong} \("):
        source.labels()
    with pytest.raises(ValueError, match="1 of 2 labels"):
        source.labels(np.array([1, 2]))
    np.testing.assert_array_equal(source.labels(np.array([0, 1, 3])), [0, 2, 1])
    np.testing.assert_array_equal(source.labels(complete=False), classes)


# --- the decoded copies


def copies(directory, split="test"):
    """The files in which the pictures and the classes of a split are kept."""
    return [next((directory / "digits" / "1.0.0").glob(f"{what}-{split}-*.npy")) for what in ("decoded", "classes")]


def test_the_copies_are_used_and_notice_new_data(digits_copy, monkeypatch):
    first = load("test", digits_copy)
    monkeypatch.setattr(stored_split, "RECORDS_PER_READ", None)  # decoding again fails
    again = load("test", digits_copy)
    np.testing.assert_array_equal(again.images(), first.images())
    np.testing.assert_array_equal(again.labels(), first.labels())
    records = digits_copy / "digits" / "1.0.0" / "digits-test.array_record-00000-of-00001"
    content = bytearray(records.read_bytes())
    content[len(content) // 2] ^= 1
    records.write_bytes(content)
    os.utime(records, (0, 0))
    with pytest.raises(ValueError, match="cannot decode"):
        load("test", digits_copy)


@pytest.mark.parametrize("is_read_only", [False, True])
def test_the_decoded_pictures_of_a_copied_set_are_used(digits_copy, tmp_path, monkeypatch, is_read_only):
    first, train_images = load("test", digits_copy), np.array(load("train", digits_copy).images())
    expected = np.array(first.images()), first.labels(), first.sha256()
    copy = tmp_path / "copy"
    shutil.copytree(digits_copy, copy, copy_function=shutil.copyfile)  # other times
    monkeypatch.setattr(stored_split, "RECORDS_PER_READ", None)  # decoding again fails
    with monkeypatch.context() as patch:
        if is_read_only:

            def refuse(*args):
                raise PermissionError("read-only")

            patch.setattr(decoded.os, "replace", refuse)
        second = load("test", copy)
    np.testing.assert_array_equal(second.images(), expected[0])
    np.testing.assert_array_equal(second.labels(), expected[1])
    assert second.sha256() == expected[2]
    np.testing.assert_array_equal(load("train", copy).images(), train_images)
    # Their content was compared once: from now on size and time are enough.
    load("test", copy)
    monkeypatch.setattr(decoded.records, "content_sha256", None)
    load("test", copy)
    assert len(list(copy.rglob("decoded-test-*.npy"))) == 1


@pytest.mark.parametrize("content", [None, "", "[1]", '{"sizes": 3}'])
def test_without_a_word_on_the_records_a_copied_set_is_decoded_anew(digits_copy, tmp_path, content):
    expected, copy = np.array(load("test", digits_copy).images()), tmp_path / "copy"
    shutil.copytree(digits_copy, copy, copy_function=shutil.copyfile)
    (about,) = copy.rglob("decoded-test-*.records")
    about.unlink() if content is None else about.write_text(content)
    np.save(next(copy.rglob("decoded-test-*.npy")), np.zeros_like(expected))  # would be seen
    np.testing.assert_array_equal(load("test", copy).images(), expected)


@pytest.mark.parametrize("damage", ["cut", "empty", "length", "missing"])
@pytest.mark.parametrize("which", [0, 1], ids=["pictures", "classes"])
def test_a_damaged_copy_is_decoded_anew(digits_copy, which, damage):
    expected = load("test", digits_copy)
    # In memory: a mapped file that becomes shorter ends the process that reads on.
    images, labels = np.array(expected.images()), expected.labels()
    path = copies(digits_copy)[which]
    if damage == "missing":
        path.unlink()
    elif damage == "length":
        np.save(path, np.load(path)[1:])
    else:
        path.write_bytes(path.read_bytes()[:100] if damage == "cut" else b"")
    again = load("test", digits_copy)
    np.testing.assert_array_equal(again.images(), images)
    np.testing.assert_array_equal(again.labels(), labels)
    for kept, array in zip(copies(digits_copy), (images, labels), strict=True):
        np.testing.assert_array_equal(np.load(kept), array)


def digest_of(source):
    """By the definition: all pixel values and labels in one piece."""
    about = f"{source.pixels.shape} {source.num_levels} {source.num_classes}\n".encode()
    return hashlib.sha256(about + source.images().tobytes() + source.labels().tobytes()).hexdigest()


def test_the_digest_is_computed_once_and_again_where_the_copy_changes(digits_copy, monkeypatch):
    monkeypatch.setattr("diffusion.data.source.IMAGES_PER_READ", 7)
    first = load("test", digits_copy)
    sha256 = first.sha256()
    assert sha256 == digest_of(first) != load("train", digits_copy).sha256()
    assert dataclasses.replace(first, file=None).sha256() == sha256
    with monkeypatch.context() as patch:
        patch.setattr(Source, "_stored_parts", None)  # computing it again fails
        assert load("test", digits_copy).sha256() == sha256
        relabelled = dataclasses.replace(first, classes=first.classes[::-1])
        with pytest.raises(TypeError):
            relabelled.sha256()
    assert relabelled.sha256() == digest_of(relabelled) != sha256 == first.sha256()
    # Another picture: the same name, length and time.
    path, _ = copies(digits_copy)
    content, stat = bytearray(path.read_bytes()), path.stat()
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = load("test", digits_copy)
    assert changed.sha256() == digest_of(changed) != sha256


def test_a_damaged_or_unwritable_digest_is_computed_again(digits_copy, monkeypatch):
    first = load("test", digits_copy)
    (kept,) = [first.file.with_name(f"{first.file.name}.sha256")]
    for content in ("", "{}", "[1]", '{"of": 1, "sha256": "ab"}'):
        kept.write_text(content)
        assert first.sha256() == digest_of(first)
    assert json.loads(kept.read_text())["sha256"] == digest_of(first)
    kept.unlink()

    def refuse(*args):
        raise PermissionError("read-only")

    monkeypatch.setattr(places.files.os, "replace", refuse)
    assert first.sha256() == digest_of(first) and not kept.exists()


def test_a_read_only_directory_is_decoded_elsewhere(digits_copy, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(places.files, "alone", refuse)
    source = load("test", digits_copy)
    assert len(source) == 299 and source.file is None and source.sha256() == digest_of(source)
    assert not [*digits_copy.rglob("decoded-*"), *digits_copy.rglob("classes-*")]


def test_wrong_levels(digits_copy):
    (digits_copy / "digits" / "1.0.0" / "metadata.json").write_text('{"num_levels": 16}')
    with pytest.raises(ValueError, match="pixel value 16, but only 16 levels"):
        load("train", digits_copy)


# --- splits without pictures


def without_pictures(root, split):
    """The set "foreign" again, but with nothing in this split."""
    path = root / "foreign" / "2.1.0" / "dataset_info.json"
    info = json.loads(path.read_text())
    for about in info["splits"]:
        if about["name"] == split:
            about["shardLengths"] = []
    path.write_text(json.dumps(info))


@pytest.mark.parametrize("stored", [("train",), ("train", "test")])  # of 4 examples none is the twentieth
def test_a_split_without_pictures_is_read_in_every_way(tmp_path, write_foreign, stored):
    write_foreign((6, 5, 3), splits=stored)
    without_pictures(tmp_path, "test")
    assert data.describe("foreign", str(tmp_path)).num_test == 0
    sources = [data.load("foreign", "test", str(tmp_path), decode=decode) for decode in ("ahead", "on_the_fly")]
    for source in sources:
        assert source.images().shape == source.images(np.arange(0)).shape == (0, 6, 5, 3)
        assert len(source) == len(source.image_digests()) == 0 and list(source.parts()) == []
    assert sources[0].sha256() == sources[1].sha256()


def test_a_set_of_no_fixed_size_whose_first_picture_cannot_be_read_is_named(tmp_path, write_foreign):
    write_foreign((None, None, 3), sizes=4 * [(40, 40)])
    (path,) = (tmp_path / "foreign" / "2.1.0").glob("*-train.array_record*")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"cannot decode the train pictures of data\.name='foreign'.*2\.1\.0 again"):
        data.describe("foreign", str(tmp_path))
    without_pictures(tmp_path, "train")
    with pytest.raises(ValueError, match=r"data\.name='foreign' has no training pictures in .*2\.1\.0"):
        data.describe("foreign", str(tmp_path))
