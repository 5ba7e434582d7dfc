"""Labels from the names of folders, from CSV and from JSON files."""

import os
import unicodedata

import pytest

from diffusion.data.folder import labels

PATHS = ["a/1.png", "b/c/2.png"]


def file_of(folder, name, text):
    path = folder / name
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return str(path)


def test_the_first_folder_is_the_label_below_those_of_the_splits():
    assert labels.find_labels(None, PATHS, {}) == ("folders", {"a/1.png": "a", "b/c/2.png": "b"})
    assert labels.find_labels("folders", PATHS, {}) == labels.find_labels(None, PATHS, {})
    splits = {"train": "train", "val": "test"}
    below = ["train/a/1.png", "val/b/c/2.png"]
    assert labels.find_labels(None, below, splits) == ("folders", {"train/a/1.png": "a", "val/b/c/2.png": "b"})


def test_without_folders_there_are_no_labels_and_asking_for_them_is_refused():
    assert labels.find_labels("none", PATHS, {}) == ("none", {})
    for paths, splits in ([*PATHS, "3.png", "4.png"], {}), (["train/3.png", "test/4.png"], {"train": "train"}):
        assert labels.find_labels(None, paths, splits) == ("none", {})
        with pytest.raises(ValueError, match=r"--labels=folders: 2 of . pictures lie in no folder.*3\.png"):
            labels.find_labels("folders", paths, splits)


ODD = os.fsdecode(b"\xff.png")


@pytest.mark.parametrize(
    "name, text",
    [
        ("labels.csv", "a/1.png,cat\nb/c/2.png,dog\n"),
        ("labels.CSV", "file,label\r\na/1.png,cat\r\n./b/c/2.png, dog \r\n"),
        ("labels.csv", '\ufefflabel,size,file\ncat,1,"a/1.png"\n\ndog,2,b/c/2.png'),
        ("labels.json", '{"a/1.png": "cat", "b//c/2.png": "dog"}'),
    ],
)
def test_files_of_labels(tmp_path, name, text):
    path = file_of(tmp_path, name, text)
    assert labels.find_labels(path, PATHS, {}) == ("file", {"a/1.png": "cat", "b/c/2.png": "dog"})


def test_names_may_hold_commas_line_ends_and_what_is_not_utf_8(tmp_path):
    path = file_of(tmp_path, "labels.csv", f'"a, b\nc.png",1\n{ODD},{ODD[0]}2\n')
    assert labels.read_labels(tmp_path / "labels.csv") == {"a, b\nc.png": "1", ODD: r"\udcff2"}
    assert labels.find_labels(path, [ODD], {}, unread=["a, b\nc.png"]) == ("file", {ODD: r"\udcff2"})


NFC, NFD = (unicodedata.normalize(form, "Zoë/été.png") for form in ("NFC", "NFD"))


@pytest.mark.parametrize("on_disk, in_file", [(NFC, NFD), (NFD, NFC), (NFC, NFC), (NFD, NFD)])
def test_a_name_may_have_another_unicode_form_than_the_file_on_the_disk(tmp_path, on_disk, in_file):
    path = file_of(tmp_path, "labels.csv", f"{in_file},cat\n1.png,dog\n")
    assert labels.find_labels(path, [on_disk], {}, unread=["1.png"]) == ("file", {on_disk: "cat"})
    both = file_of(tmp_path, "both.csv", f"{NFC},cat\n{NFD},dog\n")
    assert labels.find_labels(both, [NFC, NFD], {}) == ("file", {NFC: "cat", NFD: "dog"})  # two files on the disk
    with pytest.raises(ValueError, match=r"both.csv gives .* two labels, cat and dog"):
        labels.find_labels(both, [on_disk], {})


def test_classes_that_differ_in_their_unicode_form_alone_are_one():
    """As of pictures from two systems; where there is one form, it stays: prepared sets keep their names."""
    paths = [f"{text.split('/')[0]}/{number}.png" for number, text in enumerate((NFC, NFD, NFD))]
    assert labels.find_labels("folders", paths, {})[1] == dict.fromkeys(paths, NFC.split("/")[0])
    assert labels.find_labels("folders", paths[1:], {})[1] == dict.fromkeys(paths[1:], NFD.split("/")[0])


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("labels.csv", "a/1.png,cat\n", r"1 of 2 pictures have no label, for example b/c/2\.png"),
        ("labels.csv", "a/1.png,\nb/c/2.png,dog\n", r"1 of 2 pictures have no label, for example a/1\.png"),
        (
            "labels.csv",
            "a/1.png,x\nb/c/2.png,x\n3.png,x\n4.png,x\n",
            r"2 of 4 labels are for files.*not pictures.*for example 3\.png",
        ),
        ("labels.csv", "a/1.png,x\na/1.png,y\n", r"gives a/1\.png two labels, x and y"),
        ("labels.csv", "a/1.png,x\nb/c/2.png,x,7\n", r"cannot be read.*a row has 3 columns instead of 2"),
        ("labels.json", '{"a/1.png": "x", "b/c/2.png": "x", "a/1.png": "y"}', r"gives a/1\.png two labels, x and y"),
        ("labels.json", '{"a/1.png": "x"', "cannot be read as labels"),
        ("labels.json", '["a/1.png"]', r"must be \{path: label\}"),
        ("labels.json", '{"a/1.png": 1.5}', r"must be \{path: label\}"),
        ("labels.txt", "", r"must be folders, none, or the name of a \.csv or \.json file"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        labels.find_labels(file_of(tmp_path, name, text), PATHS, {})


def test_a_missing_file_of_labels_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.csv"):
        labels.find_labels(str(tmp_path / "gone.csv"), PATHS, {})


def test_class_names_are_sorted_and_numbers_by_their_value():
    assert labels.class_names(["dog", "cat", "dog", "10"]) == ["10", "cat", "dog"]
    assert labels.class_names(["10", "9", "0", "9"]) == ["0", "9", "10"]
    assert labels.class_names([]) == []


def test_a_label_is_one_line_of_valid_utf_8():
    assert labels.clean(" a\n b\t") == "a b"
    labels.clean(ODD).encode()
