"""The pictures in a folder: every file is in one list, digests are kept, and splits are assigned."""

import errno
import hashlib
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.data.folder import listing
from diffusion.data.folder.listing import Picture, Unread


def write(folder, *paths):
    """Makes files whose content is their path."""
    for path in paths:
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.fsencode(path))


def paths_of(found):
    return [file.path for file in found.pictures]


def test_every_file_is_in_one_list_in_the_order_of_the_paths(tmp_path):
    pictures = [
        "B.JPG",
        "a b/ä ö.png",
        "a/x.jpeg",
        "a-1/x.webp",
        "z/y/x/w.TIF",
        "é.gif",
        "e.bmp",
        os.fsdecode(b"\xff.png"),
    ]
    others = ["notes.txt", ".hidden.jpg", ".git/x.png", "a/.DS_Store", "noname", "x.jpg.part", "movie.mp4"]
    write(tmp_path, *pictures, *others)
    found = listing.scan(tmp_path)
    assert paths_of(found) == sorted(pictures)
    assert (found.others, found.unread) == (sorted(others), [])
    for file in found.pictures:
        assert file.num_bytes == len(os.fsencode(file.path))


def test_links_are_followed_but_not_in_circles(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    write(folder, "a/1.png")
    write(elsewhere, "2.png")
    (folder / "b").symlink_to(elsewhere)
    (folder / "3.png").symlink_to(elsewhere / "2.png")
    (folder / "a" / "up").symlink_to(folder)
    (folder / "gone.png").symlink_to(elsewhere / "gone.png")
    (folder / "itself.png").symlink_to("itself.png")
    (folder / "gone.txt").symlink_to(elsewhere / "gone.txt")
    (folder / "through.png").symlink_to(elsewhere / "2.png" / "a file is no folder.png")
    (folder / "long.png").symlink_to(elsewhere / (300 * "a"))
    os.mkfifo(folder / "pipe.png")  # to open it would wait for ever
    found = listing.scan(folder)
    assert paths_of(found) == ["3.png", "a/1.png", "b/2.png"]
    assert found.others == ["a/up/", "gone.txt", "pipe.png"]
    assert found.unread == [
        Unread("gone.png", os.strerror(errno.ENOENT)),
        Unread("itself.png", os.strerror(errno.ELOOP)),
        Unread("long.png", os.strerror(errno.ENAMETOOLONG)),
        Unread("through.png", os.strerror(errno.ENOTDIR)),
    ]


def test_the_sets_own_folder_is_passed_over_and_another_one_of_its_name_is_not(tmp_path):
    write(tmp_path, "set/1.0.0/1.png", "other/1.0.0/2.png", "3.png")
    found = listing.scan(tmp_path, leave_out=[tmp_path / "set" / "1.0.0", tmp_path / "missing"])
    assert paths_of(found) == ["3.png", "other/1.0.0/2.png"]


def test_huge_files_and_what_is_no_folder(tmp_path):
    write(tmp_path, "1.png")
    with (tmp_path / "huge.tif").open("wb") as file:
        file.truncate(listing.MAX_FILE_BYTES + 1)
    found = listing.scan(tmp_path)
    assert (paths_of(found), found.unread) == (["1.png"], [Unread("huge.tif", "it is larger than 1 GiB")])
    for path in (tmp_path / "1.png", tmp_path / "missing"):
        with pytest.raises(ValueError, match="is not a folder"):
            listing.scan(path)


def failing(name, of_path, code):
    """os.`name`, but it fails with the error `code` for paths that end with `of_path`."""
    original = getattr(os, name)

    def function(path, *args, **kwargs):
        if str(path).endswith(of_path):
            raise OSError(code, os.strerror(code), str(path))
        return original(path, *args, **kwargs)

    return function


def test_a_folder_that_may_not_be_read_is_told_and_a_failing_disk_stops(tmp_path, monkeypatch):
    write(tmp_path, "a/1.png", "b/2.png")
    monkeypatch.setattr(os, "listdir", failing("listdir", "/a", errno.EACCES))
    found = listing.scan(tmp_path)
    assert (paths_of(found), found.unread) == (["b/2.png"], [Unread("a/", "Permission denied")])
    monkeypatch.setattr(os, "listdir", failing("listdir", "/a", errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        listing.scan(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(os, "stat", failing("stat", "2.png", errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        listing.scan(tmp_path)


# --- Contents


def digests(folder, cache):
    return listing.content_digests(folder, listing.scan(folder).pictures, cache)


def test_digests_are_kept_until_a_file_changes(tmp_path, monkeypatch):
    folder, cache = tmp_path / "folder", tmp_path / "cache"
    write(folder, *[f"{i}.png" for i in range(5)])
    expected = {f"{i}.png": hashlib.sha256(f"{i}.png".encode()).hexdigest() for i in range(5)}
    assert digests(folder, cache) == (expected, [])
    hashed = []
    original = listing._digest
    monkeypatch.setattr(listing, "_digest", lambda path: hashed.append(path.name) or original(path))
    assert digests(folder, cache) == (expected, [])
    assert not hashed
    (folder / "1.png").write_bytes(b"another")
    write(folder, "6.png")
    changed = {"1.png": hashlib.sha256(b"another").hexdigest(), "6.png": hashlib.sha256(b"6.png").hexdigest()}
    assert digests(folder, cache) == (expected | changed, [])
    assert sorted(hashed) == ["1.png", "6.png"]
    # A damaged line is ignored, even one that is no text.
    cache.write_bytes(b"\xff\xfe\n" + cache.read_bytes() + b"\x80\n")
    assert digests(folder, cache) == (expected | changed, []) and len(hashed) == 2
    # A kill may leave half a line, to which the next call appends.
    cache.write_bytes(cache.read_bytes()[:-20])
    for count in (3, 4, 4):
        assert digests(folder, cache) == (expected | changed, [])
        assert len(hashed) == count


def test_of_a_file_that_may_not_be_read_there_is_a_reason_and_a_failing_disk_stops(tmp_path, monkeypatch):
    write(tmp_path, "1.png", "2.png")
    monkeypatch.setattr(listing.Path, "open", failing_open("1.png", errno.EACCES))
    found, unread = digests(tmp_path, tmp_path / "cache")
    assert (list(found), unread) == (["2.png"], [Unread("1.png", "Permission denied")])
    monkeypatch.setattr(listing.Path, "open", failing_open("1.png", errno.EIO))
    with pytest.raises(OSError, match="Input/output error.*1.png"):
        digests(tmp_path, tmp_path / "cache")


REAL_OPEN = listing.Path.open


def failing_open(name, code):
    """Path.open, but it fails with the error `code` for files of that name."""

    def function(path, *args, **kwargs):
        if path.name == name:
            raise OSError(code, os.strerror(code), str(path))
        return REAL_OPEN(path, *args, **kwargs)

    return function


# --- Splits


@pytest.mark.parametrize("train", ["train", "Train"])
@pytest.mark.parametrize("test", ["test", "val", "valid", "validation", "TEST"])
def test_folders_that_are_splits(tmp_path, train, test):
    paths = [f"{train}/a.png", f"{test}/x/b.png"]
    assert listing.split_folders(paths, tmp_path) == {train: "train", test: "test"}


@pytest.mark.parametrize(
    "paths",
    [
        ["a.png"],
        ["cats/a.png", "dogs/b.png"],
        ["train/a.png", "bus/b.png"],  # classes of vehicles
        ["train/a.png", "b.png"],
        ["photos/train/a.png", "photos/test/b.png"],
    ],
)
def test_folders_that_are_no_splits(tmp_path, paths):
    assert listing.split_folders(paths, tmp_path) == {}


@pytest.mark.parametrize(
    "paths, message",
    [
        (["train/a.png"], r"pictures in train/ only: put others into test/"),
        (["val/a.png"], r"pictures in val/ only: put others into train/"),
        (["train/a.png", "test/b.png", "val/c.png"], r"has test/, val/, but a set has one train and one test"),
        (["train/a.png", "test/b.png", "c.png", "x/d.png"], r"2 of 4 pictures lie outside of train/ and test/.*c\.png"),
    ],
)
def test_splits_that_are_not_clear_are_refused(tmp_path, paths, message):
    with pytest.raises(ValueError, match=message):
        listing.split_folders(paths, tmp_path)


CONTENTS = st.dictionaries(st.text("abc", min_size=1, max_size=4), st.binary(max_size=2), min_size=1, max_size=30)


@given(CONTENTS, CONTENTS, st.floats(0.01, 0.99))
@settings(max_examples=50)
def test_adding_and_renaming_pictures_moves_none_between_splits(before, added, fraction):
    def split_of(contents):
        of_path = {path: hashlib.sha256(content).hexdigest() for path, content in contents.items()}
        pictures = listing.with_splits(of_path, {}, {}, fraction)
        assert [picture.path for picture in pictures] == sorted(contents)
        return {contents[picture.path]: picture.split for picture in pictures}

    renamed = {path + "!": content for path, content in before.items()}
    after = split_of(before | {f"new {path}": content for path, content in added.items()} | renamed)
    assert split_of(before).items() <= after.items()


def test_the_fraction_is_that_of_the_first_eight_bytes():
    assert listing.is_test("4" + "0" * 63, 0.26) and not listing.is_test("4" + "0" * 63, 0.25)
    assert listing.is_test("0" * 64, 1e-9) and not listing.is_test("f" * 64, 0.999)
    many = [hashlib.sha256(bytes([i % 256, i // 256])).hexdigest() for i in range(10_000)]
    assert abs(sum(listing.is_test(sha256, 0.05) for sha256 in many) - 500) < 5 * (10_000 * 0.05 * 0.95) ** 0.5


def test_pictures_in_both_splits_are_told():
    def picture(path, content):
        return Picture(path, content, "test" if path.startswith("val/") else "train", None)

    pictures = [
        picture("train/a", "1"), picture("train/b", "1"), picture("train/c", "2"), picture("train/d", "3"),
        picture("val/e", "3"), picture("val/f", "1"), picture("val/g", "4"),
    ]  # fmt: skip
    assert sorted(listing.in_both_splits(pictures)) == [("train/a", "val/f"), ("train/d", "val/e")]


def test_the_fingerprint_is_of_all_that_is_known_of_the_pictures():
    picture = Picture("a", "1", "train", "cat")
    others = [
        [picture._replace(path="b")], [picture._replace(sha256="2")], [picture._replace(split="test")],
        [picture._replace(label="dog")], [picture._replace(label=None)], [picture, picture], [],
    ]  # fmt: skip
    fingerprints = {listing.fingerprint(pictures) for pictures in ([picture], *others)}
    assert len(fingerprints) == 8 and listing.fingerprint([picture]) in fingerprints
