"""A folder of pictures as a data set: the result of the command, and its errors."""

import fcntl
import io
import json
import os
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from commands import NOT_UTF_8, command, files_of, interrupt, last_error, picture, plain_folder, records, run, save

from diffusion import data
from diffusion.data import tfds as prepared
from diffusion.data.folder import __main__ as program
from diffusion.data.folder import decoding, shards

# --- The whole way


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder with 42 pictures of many kinds, two damaged ones and four other files; and what they are, by path."""
    root, saved = tmp_path_factory.mktemp("mixed pictures") / "Bilder ü", {}
    kinds = [
        ("jpg", "JPEG", "RGB"), ("JPEG", "JPEG", "L"), ("png", "PNG", "RGB"), ("PNG", "PNG", "P"),
        ("webp", "WEBP", "RGB"), ("gif", "GIF", "P"), ("bmp", "BMP", "RGB"), ("tif", "TIFF", "CMYK"),
        ("jpg", "PNG", "RGB"), ("png", "PNG", "1"),
    ]  # fmt: skip
    for i in range(40):
        extension, picture_format, mode = kinds[i % len(kinds)]
        path = f"{'cät' if i % 3 else 'big dog'}/{i % 2}/no {i}.{extension}"
        image = picture(i, *((8, 8), (9, 12), (30, 20))[i % 3])
        image = image.quantize(16) if mode == "P" else image.convert(mode)
        save(image, root / path, format=picture_format)
        saved[path] = "cät" if i % 3 else "big dog"
    for path in (f"cät/{NOT_UTF_8}", "big dog/同じ.png"):
        save(picture(len(saved)), root / path, format="PNG")
        saved[path] = path.split("/")[0]
    whole = (root / "big dog" / "0" / "no 0.jpg").read_bytes()
    (root / "big dog" / "cut off.jpg").write_bytes(whole[:-20])
    (root / "cät" / "empty.png").touch()
    for path in ("read\nme.txt", ".DS_Store", "cät/.thumbnail.png", "labels.csv"):
        (root / path).write_text("no picture")
    return root, saved


@pytest.fixture(scope="module")
def mixed_set(mixed, tmp_path_factory):
    """The data_dir in which they are prepared, what the commands printed, and their exit codes."""
    root, (pictures, _) = tmp_path_factory.mktemp("data"), mixed
    arguments = command(pictures, root, "--test-fraction=0.3", size="8x6")
    outputs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "PICTURES_PER_SHARD", 7)
        for flags in ([], ["--skip-bad"], []):
            with pytest.MonkeyPatch.context() as streams:
                streams.setattr(sys, "stdout", io.StringIO())
                streams.setattr(sys, "stderr", io.StringIO())
                code = program.main([*arguments, *flags])
                outputs.append((code, sys.stdout.getvalue(), sys.stderr.getvalue()))
            found = prepared.find("pets", root)
            assert (found is None) == (len(outputs) == 1)
            # From here on nothing is decoded any more: --skip-bad only finishes, and then nothing is left to do.
            patch.setattr(decoding, "to_pixels", None)
    return root, outputs


def test_every_file_is_accounted_for(mixed_set):
    root, [(code, begin, errors), (code_2, report, _), (code_3, again, _)] = mixed_set
    assert (code, code_2, code_3) == (1, 0, 0)
    assert "files: 44 pictures, other files: 4 (.DS_Store, cät/.thumbnail.png, labels.csv, read me.txt)" in begin
    assert "labels: 2 classes (big dog, cät)" in begin
    assert "44 pictures of 8x6x3, 6.34kB decoded" in begin
    *listed, last = [line for line in errors.replace("\r", "\n").splitlines() if line.startswith(("cannot", "error"))]
    assert [line.split(": ")[1] for line in listed] == ["big dog/cut off.jpg", "cät/empty.png"]
    assert "truncated" in listed[0] and "the file is empty" in listed[1]
    assert last.startswith("error: cannot read 2 of 44 pictures;") and "--skip-bad" in last
    num_train, num_test = (len(data.load("pets", split, str(root))) for split in ("train", "test"))
    assert num_train + num_test == 42
    last = report.splitlines()[-1]
    assert last == (
        f"prepared: {num_train} train, {num_test} test; left out: 2 that cannot be read, other files: 4"
    )
    assert again.splitlines()[-1] == f"{root}/pets/1.0.0 is prepared already"
    assert [path.name for path in (root / "pets").iterdir()] == ["1.0.0"]


def test_the_project_and_tfds_read_the_same_pictures_and_labels(mixed, mixed_set):
    pictures, saved = mixed
    root, _ = mixed_set
    target, seen = decoding.Target(8, 6), []
    for split in ("train", "test"):
        ours, theirs = data.load("pets", split, str(root)), records(root, split)
        assert (ours.image_shape, ours.num_levels, ours.num_classes) == ((8, 6, 3), 256, 2)
        assert len(ours) == len(theirs) > 0
        names = tfds.builder_from_directory(root / "pets" / "1.0.0").info.features["label"].names
        for i, example in enumerate(theirs):
            path = os.fsdecode(example["file"])
            seen.append(path)
            expected = decoding.to_pixels((pictures / path).read_bytes(), target)
            np.testing.assert_array_equal(example["image"], expected)
            np.testing.assert_array_equal(ours.images()[i], expected)
            assert names[example["label"]] == names[ours.labels()[i]] == saved[path]
    assert sorted(seen) == sorted(saved)
    described = data.describe("pets", str(root))
    assert (described.image_shape, described.num_classes) == ((8, 6, 3), 2)


@pytest.mark.parametrize("channels, mode", [(3, "RGB"), (1, "L")])
def test_pictures_of_the_right_size_are_those_that_were_saved(tmp_path, channels, mode):
    pictures, root = plain_folder(tmp_path / "pictures"), tmp_path / "data"
    assert run(pictures, root, f"--channels={channels}", "--test-fraction=0.3") == 0
    seen = {}
    for split in ("train", "test"):
        for example in records(root, split):
            seen[example["file"].decode()] = example["image"]
        assert data.load("pets", split, str(root)).num_classes == 0
    assert sorted(seen) == [f"{i:02d}.png" for i in range(30)]
    for path, pixels in seen.items():
        expected = np.asarray(picture(int(path[:2])).convert(mode))
        np.testing.assert_array_equal(pixels, expected.reshape(8, 8, channels))


def test_adding_pictures_moves_none_between_splits(tmp_path):
    pictures = plain_folder(tmp_path / "pictures", 40)
    splits = []
    for name, more in (("before", 0), ("after", 25)):
        for i in range(more):
            save(picture(1000 + i), pictures / f"new {i}" / "x.png", format="PNG")
        assert run(pictures, tmp_path, "--test-fraction=0.4", "--labels=none", name=name) == 0
        splits.append(
            {example["file"]: split for split in ("train", "test") for example in records(tmp_path, split, name)}
        )
    before, after = splits
    assert (len(before), len(after)) == (40, 65) and before.items() <= after.items()


def test_folders_as_splits_and_pictures_that_are_in_both(tmp_path, capsys):
    pictures, root = tmp_path / "pictures", tmp_path / "data"
    for path, number in {"train/a/1": 1, "train/b/2": 2, "train/b/3": 3, "VAL/a/4": 4, "VAL/b/5": 3}.items():
        save(picture(number), pictures / f"{path}.png", format="PNG")
    assert run(pictures, root) == 0
    printed = capsys.readouterr().out
    assert "warning: 1 pictures are in both splits (train/b/3.png = VAL/b/5.png)" in printed
    files = {split: [example["file"] for example in records(root, split)] for split in ("train", "test")}
    assert files == {
        "train": [b"train/a/1.png", b"train/b/2.png", b"train/b/3.png"],
        "test": [b"VAL/a/4.png", b"VAL/b/5.png"],
    }
    assert data.load("pets", "train", str(root)).labels().tolist() == [0, 1, 1]
    assert data.load("pets", "test", str(root)).labels().tolist() == [0, 1]


def test_a_picture_outside_of_the_folders_is_named_as_the_cause_that_there_are_no_labels(tmp_path, capsys):
    pictures = tmp_path / "pictures"
    plain_folder(pictures / "cats", 29)
    save(picture(29), pictures / "stray.png", format="PNG")
    assert run(pictures, tmp_path, "--test-fraction=0.3") == 0
    assert "labels: none; 1 of 30 pictures lie in no folder (stray.png)\n" in capsys.readouterr().out
    assert data.load("pets", "train", str(tmp_path)).num_classes == 0


def test_labels_of_a_file(tmp_path):
    pictures, labels = plain_folder(tmp_path / "pictures"), tmp_path / "labels.csv"
    labels.write_text("file,label\n" + "".join(f"{i:02d}.png,{i % 11}\n" for i in range(30)))
    assert run(pictures, tmp_path, f"--labels={labels}", "--test-fraction=0.3") == 0
    for split in ("train", "test"):
        numbers = [int(example["file"][:2]) for example in records(tmp_path, split)]
        # Eleven numbers as names keep their value, which the order of texts would not.
        assert data.load("pets", split, str(tmp_path)).labels().tolist() == [number % 11 for number in numbers]


def test_a_shard_of_which_nothing_can_be_read(tmp_path, monkeypatch):
    pictures = plain_folder(tmp_path / "pictures")
    for i in range(12):
        (pictures / f"{i:02d}.png").write_bytes(b"damaged %d" % i)
    monkeypatch.setattr(shards, "PICTURES_PER_SHARD", 2)
    assert run(pictures, tmp_path, "--skip-bad", "--test-fraction=0.4") == 0
    info = json.loads((tmp_path / "pets" / "1.0.0" / "dataset_info.json").read_text())
    assert "0" in info["splits"][0]["shardLengths"]
    files = [example["file"].decode() for split in ("train", "test") for example in records(tmp_path, split)]
    assert sorted(files) == [f"{i:02d}.png" for i in range(12, 30)]
    assert sum(len(data.load("pets", split, str(tmp_path))) for split in ("train", "test")) == 18


def test_the_result_may_lie_in_the_folder_itself(tmp_path, capsys, monkeypatch):
    pictures = plain_folder(tmp_path / "pictures")
    with monkeypatch.context() as patch:
        interrupt(patch, 15)
        assert run(pictures, pictures, "--test-fraction=0.3") == os.EX_TEMPFAIL
    for _ in range(2):
        assert run(pictures, pictures, "--test-fraction=0.3") == 0
    printed = capsys.readouterr().out
    assert printed.count("files: 30 pictures, other files: 0\n") == 2 and "prepared already" in printed


# --- What is refused


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--name=Pets"], "--name=Pets must begin with a small letter"),
        ([f"--name={201 * 'a'}"], "--name=aaaaaaaaaaaaaaaaaaaa… has 201 letters, but names of files have room"),
        (["--name=digits"], "--name=digits is the name of a built-in data set"),
        (["--size=0"], "--size=0 must look like 64"),
        (["--size=8x"], "--size=8x must look like 64"),
        (["--workers=0"], "--workers=0 must be at least 1"),
        (["--test-fraction=1"], "--test-fraction=1.0 must lie between 0 and 1"),
        (["--test-fraction=0.0000001"], "none of 30 pictures is in the test split; add pictures, give another"),
        (["--background=whit"], "--background=whit is not a colour"),
        (["--labels=folders"], "--labels=folders: 30 of 30 pictures lie in no folder"),
        (["--labels=gone.csv"], "No such file or directory: 'gone.csv'"),
        (["--data-dir=gs://bucket"], "gs://bucket is not a local directory"),
    ],
)
def test_wrong_flags_are_one_line(tmp_path, capsys, flags, message):
    pictures = plain_folder(tmp_path / "pictures")
    assert run(pictures, tmp_path / "data", *flags) == 2
    error = last_error(capsys)
    assert error.startswith("error: ") and message in error
    assert not list(tmp_path.rglob("dataset_info.json"))


def test_folders_without_pictures_and_a_fraction_beside_split_folders(tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    for path, message in ((tmp_path, "has no pictures"), (tmp_path / "gone", "is not a folder")):
        assert run(path, tmp_path / "data") == 2
        assert message in last_error(capsys)
    for path in ("train/1.png", "test/2.png"):
        save(picture(0), tmp_path / path, format="PNG")
    assert run(tmp_path, tmp_path / "data", "--test-fraction=0.2") == 2
    assert "no effect where the folders train, test are the splits" in last_error(capsys)


def test_a_split_of_which_nothing_can_be_read(tmp_path, capsys):
    for path in ("train/1.png", "train/2.png", "test/3.png"):
        save(picture(0), tmp_path / path, format="PNG")
    (tmp_path / "test" / "3.png").write_bytes(b"damaged")
    assert run(tmp_path, tmp_path / "data", "--skip-bad") == 2
    assert "none of 2 pictures is in the test split" in last_error(capsys)
    assert prepared.find("pets", tmp_path / "data") is None


def test_what_is_prepared_is_never_made_anew(tmp_path, capsys):
    pictures = plain_folder(tmp_path / "pictures")
    assert run(pictures, tmp_path, "--test-fraction=0.3") == 0
    before = files_of(tmp_path / "pets")
    assert run(pictures, tmp_path, "--test-fraction=0.3", "--resize=lanczos") == 2
    assert "made with other settings (resize: box, now lanczos); take another --name" in last_error(capsys)
    save(picture(99), pictures / "99.png", format="PNG")
    assert run(pictures, tmp_path, "--test-fraction=0.3") == 2
    assert "was made from other files; take another --name" in last_error(capsys)
    (pictures / "99.png").unlink()
    assert run(pictures, tmp_path, "--test-fraction=0.3") == 0
    assert files_of(tmp_path / "pets") == before


def test_sets_of_others_are_left_alone(tmp_path, capsys):
    pictures = plain_folder(tmp_path / "pictures")
    assert run(pictures, tmp_path, "--test-fraction=0.3") == 0
    shutil.copytree(tmp_path / "pets" / "1.0.0", tmp_path / "others" / "2.1.0")
    shutil.copytree(tmp_path / "pets" / "1.0.0", tmp_path / "theirs" / "1.0.0")
    (tmp_path / "theirs" / "1.0.0" / "metadata.json").unlink()
    for name, message in (("others", "is the name of the data set in"), ("theirs", "was not made by this command")):
        before = files_of(tmp_path / name)
        assert run(pictures, tmp_path, "--test-fraction=0.3", name=name) == 2
        assert message in last_error(capsys)
        assert files_of(tmp_path / name) == before


def test_two_at_once_do_not_mix(tmp_path, capsys):
    pictures, staging = plain_folder(tmp_path / "pictures"), tmp_path / "pets" / "incomplete-1.0.0"
    staging.mkdir(parents=True)
    with (staging / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(pictures, tmp_path) == 2
    assert "incomplete-1.0.0 is in use by another process; wait for it, or stop it" in last_error(capsys)
    assert run(pictures, tmp_path, "--test-fraction=0.3") == 0


def test_too_little_room_is_told_before_anything_is_decoded(tmp_path, capsys, monkeypatch):
    pictures = plain_folder(tmp_path / "pictures")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=30 * 8 * 8 * 3 - 1))
    monkeypatch.setattr(decoding, "to_pixels", None)
    assert run(pictures, tmp_path, "--test-fraction=0.3") == 2
    assert "the pictures take up to 5.76kB, but" in last_error(capsys)
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=30 * 8 * 8 * 3))
    assert run(pictures, tmp_path, "--test-fraction=0.3") == 0
