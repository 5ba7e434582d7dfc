"""Labels of the pictures in a folder: from the names of folders, or from a CSV or JSON file."""

import csv
import io
import json
import posixpath
import unicodedata
from collections.abc import Iterable
from pathlib import Path


def find_labels(
    wanted: str | None, paths: list[str], splits: dict[str, str], unread: Iterable[str] = ()
) -> tuple[str, dict[str, str]]:
    """("folders", "none" or "file", the label of each picture); no labels at all for "none".

    Args:
        wanted: "folders", "none" or the name of a file. None for "folders" if every picture lies in one, else "none".
        paths: the paths of all pictures.
        splits: the top-level folders that are splits, not labels.
        unread: the paths of files that cannot be read. They may have labels.

    Raises:
        ValueError: `wanted` is none of these, a picture has no label, or a label has no picture.
        OSError: the file of labels cannot be read.
    """
    if wanted == "none":
        return "none", {}
    if wanted in (None, "folders"):
        labels = folder_labels(paths, splits)
        if wanted is None and len(labels) < len(paths):
            return "none", {}
        _refuse_unlabelled(paths, labels, "lie in no folder that could be their label", "--labels=folders")
        return "folders", _of_one_form(labels)
    if Path(wanted).suffix.lower() not in (".csv", ".json"):
        raise ValueError(f"--labels={wanted} must be folders, none, or the name of a .csv or .json file")
    labels = _by_path(read_labels(Path(wanted)), {*paths, *unread}, f"--labels={wanted}")
    _refuse_unlabelled(paths, labels, "have no label", f"--labels={wanted}")
    unknown = sorted(labels.keys() - {*paths, *unread})
    if unknown:
        raise ValueError(
            f"--labels={wanted}: {len(unknown):,} of {len(labels):,} labels are for files that are not pictures in the "
            f"folder, for example {unknown[0]}"
        )
    return "file", _of_one_form({path: labels[path] for path in paths})


def _by_path(labels: dict[str, str], paths: set[str], flag: str) -> dict[str, str]:
    """The labels by path. A name in another Unicode form counts if one path has it.

    macOS writes é as e and an accent (NFD), other systems as one letter (NFC).

    Raises:
        ValueError: two names mean one path and have different labels.
    """
    of_form: dict[str, list[str]] = {}
    for path in paths:
        of_form.setdefault(_form(path), []).append(path)
    found: dict[str, str] = {}
    for name, label in labels.items():
        alike = of_form.get(_form(name), [])
        path = alike[0] if name not in paths and len(alike) == 1 else name
        if found.setdefault(path, label) != label:
            raise ValueError(f"{flag} gives {path} two labels, {found[path]} and {label}")
    return found


def _of_one_form(labels: dict[str, str]) -> dict[str, str]:
    """The same labels, with one form for labels that differ only in their Unicode form, because they are one class."""
    forms: dict[str, set[str]] = {}
    for label in labels.values():
        forms.setdefault(_form(label), set()).add(label)
    return {path: _form(label) if len(forms[_form(label)]) > 1 else label for path, label in labels.items()}


def _form(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _refuse_unlabelled(paths: list[str], labels: dict[str, str], what: str, flag: str) -> None:
    missing = [path for path in paths if path not in labels]
    if missing:
        raise ValueError(f"{flag}: {len(missing):,} of {len(paths):,} pictures {what}, for example {missing[0]}")


def folder_labels(paths: list[str], splits: dict[str, str]) -> dict[str, str]:
    """The label of each picture: the name of the first folder, below those of the splits.

    Pictures that lie in no such folder are left out.
    """
    labels = {}
    for path in paths:
        folders = path.split("/")[:-1]
        if splits:
            folders = folders[1:]
        if folders and clean(folders[0]):
            labels[path] = clean(folders[0])
    return labels


def read_labels(path: Path) -> dict[str, str]:
    """The labels of a CSV file with columns file and label, or of a JSON file {path: label}, by path.

    A CSV file may begin with a line that names its columns. It may then have other columns, in any order. An empty
    label counts as none.

    Raises:
        ValueError: it is neither of them, or gives a picture two labels.
        OSError: it cannot be read.
    """
    try:
        # A byte order mark is no part of a name, and names need not be valid UTF-8.
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
        pairs = _json_pairs(text) if path.suffix.lower() == ".json" else _csv_pairs(text)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"--labels={path} cannot be read as labels ({error})") from error
    labels = {}
    for file, label in pairs:
        name, label = posixpath.normpath(file), clean(label)
        if label and labels.setdefault(name, label) != label:
            raise ValueError(f"--labels={path} gives {name} two labels, {labels[name]} and {label}")
    return labels


def _json_pairs(text: str) -> list[tuple[str, str]]:
    content = json.loads(text, object_pairs_hook=tuple)  # a dict would hide the first of two labels
    if not isinstance(content, tuple) or not all(isinstance(label, str | int) for _, label in content):
        raise ValueError("it must be {path: label}, each label a text or an integer")
    return [(file, str(label)) for file, label in content]


def _csv_pairs(text: str) -> list[tuple[str, str]]:
    rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    header = [name.strip().lower() for name in rows[0]] if rows else []
    if "file" in header and "label" in header:
        file, label = header.index("file"), header.index("label")
        rows = rows[1:]
    else:
        file, label, header = 0, 1, ["file", "label"]
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row has {len(row)} columns instead of {len(header)}: {','.join(row)}")
    return [(row[file], row[label]) for row in rows]


def clean(name: str) -> str:
    """A class name that TFDS can store: one line of valid UTF-8, without white space at its ends."""
    return " ".join(name.encode("utf-8", "backslashreplace").decode().split())


def class_names(labels: Iterable[str]) -> list[str]:
    """The names in alphabetical order, or in numerical order if all are numbers."""
    names = sorted(set(labels))
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names
