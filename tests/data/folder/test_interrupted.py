"""A preparation that is interrupted, or whose disk fails, ends like an undisturbed one."""

import json
import os
import resource
from pathlib import Path

import pytest
from commands import files_of, interrupt, last_error, picture, plain_folder, run, save, undisturbed

from diffusion.data import tfds as prepared
from diffusion.data.folder import decoding, shards


@pytest.fixture
def begun(tmp_path, monkeypatch, capsys):
    """A preparation that was stopped after half of the pictures: the pictures, and the data_dir."""
    pictures, root = plain_folder(tmp_path / "pictures"), tmp_path / "data"
    monkeypatch.setattr(shards, "PICTURES_PER_SHARD", 4)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 15)
        assert run(pictures, root, "--test-fraction=0.3") == os.EX_TEMPFAIL
    assert last_error(capsys) == "stopped; the same command goes on"
    assert prepared.find("pets", root) is None
    return pictures, root


def test_the_same_command_goes_on(begun, tmp_path, monkeypatch):
    pictures, root = begun
    calls = []
    original = decoding.to_pixels
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "to_pixels", lambda *arguments: calls.append(1) or original(*arguments))
        resumed = undisturbed(pictures, root)
    assert len(calls) <= 30 - 12  # three complete shards at least are kept
    assert resumed == undisturbed(pictures, tmp_path / "straight")


def test_other_settings_are_refused_and_other_files_are_noticed(begun, tmp_path, capsys):
    pictures, root = begun
    assert run(pictures, root, "--test-fraction=0.3", size=4) == 2
    error = last_error(capsys)
    assert "incomplete-1.0.0 was made with other settings (height: 8, now 4; width: 8, now 4)" in error
    save(picture(77), pictures / "03.png", format="PNG")
    save(picture(78), pictures / "new.png", format="PNG")
    (pictures / "05.png").unlink()
    assert undisturbed(pictures, root) == undisturbed(pictures, tmp_path / "straight")


def test_a_record_file_that_is_gone_is_made_again(begun, tmp_path):
    pictures, root = begun
    next((root / "pets" / "incomplete-1.0.0" / "data").iterdir()).unlink()
    assert undisturbed(pictures, root) == undisturbed(pictures, tmp_path / "straight")


@pytest.mark.parametrize("damage", [b"", b'{"height": 8', b"\xff\xfe", b"[8]"])
def test_damaged_files_are_named_with_what_to_do(begun, damage, capsys):
    pictures, root = begun
    settings = root / "pets" / "incomplete-1.0.0" / "settings.json"
    settings.write_bytes(damage)
    assert run(pictures, root, "--test-fraction=0.3") == 2
    error = last_error(capsys)
    assert error.startswith(f"error: {settings} is damaged (") and "; delete this file and give the same" in error
    settings.unlink()
    assert run(pictures, root, "--test-fraction=0.3") == 0
    metadata = root / "pets" / "1.0.0" / "metadata.json"
    metadata.write_bytes(damage)
    assert run(pictures, root, "--test-fraction=0.3") == 2
    error = last_error(capsys)
    assert error.startswith(f"error: {metadata} is damaged (")
    assert error.endswith(f"; take another --name, or delete {metadata.parent}")


def test_a_class_that_comes_later_renumbers_the_others(tmp_path, monkeypatch):
    pictures, labels = plain_folder(tmp_path / "pictures"), tmp_path / "labels.json"
    of_picture = {f"{i:02d}.png": "cat" if i % 2 else "dog" for i in range(30)}
    flags = ["--test-fraction=0.3", f"--labels={labels}"]
    monkeypatch.setattr(shards, "PICTURES_PER_SHARD", 4)
    labels.write_text(json.dumps(of_picture))
    with monkeypatch.context() as patch:
        interrupt(patch, 15)
        assert run(pictures, tmp_path / "data", *flags) == os.EX_TEMPFAIL
    labels.write_text(json.dumps(of_picture | {"29.png": "ant"}))
    results = []
    for root in (tmp_path / "data", tmp_path / "straight"):
        assert run(pictures, root, *flags) == 0
        results.append(files_of(root))
    assert results[0] == results[1]


def test_a_failing_disk_is_no_damage(begun, tmp_path, monkeypatch, capsys):
    pictures, root = begun
    original = Path.read_bytes

    def read_bytes(path):
        if path.name == "29.png":
            raise OSError(5, "Input/output error", str(path))
        return original(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read_bytes)
        assert run(pictures, root, "--test-fraction=0.3", "--skip-bad") == 2
    assert last_error(capsys) == "error: 29.png could not be read any more (Input/output error)"
    assert prepared.find("pets", root) is None
    assert undisturbed(pictures, root) == undisturbed(pictures, tmp_path / "straight")


def test_a_full_disk_is_told_and_nothing_of_it_stays(begun, tmp_path, capsys):
    pictures, root = begun
    lock = "pets/incomplete-1.0.0/lock"  # says since when
    before = files_of(root) | {lock: None}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # no record file is smaller
    try:
        assert run(pictures, root, "--test-fraction=0.3") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = last_error(capsys)
    assert error.startswith("error: ") and "could not be written" in error and "File too large" in error
    assert files_of(root) | {lock: None} == before
    assert undisturbed(pictures, root) == undisturbed(pictures, tmp_path / "straight")


def test_a_picture_that_changes_meanwhile_is_told(tmp_path, monkeypatch, capsys):
    pictures, root = plain_folder(tmp_path / "pictures"), tmp_path / "data"
    original = shards.complete

    def complete(*arguments):
        save(picture(77), pictures / "03.png", format="PNG")
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "complete", complete)
        assert run(pictures, root, "--test-fraction=0.3") == 2
    assert last_error(capsys) == "error: 03.png changed meanwhile; give the same command again"
    assert undisturbed(pictures, root) == undisturbed(pictures, tmp_path / "straight")
