"""Files are complete or unchanged."""

import resource

import numpy as np
import pytest

from diffusion.reporting import pictures, plots
from diffusion.runtime import files


def test_a_file_appears_under_its_name_once_it_is_complete(tmp_path):
    path = tmp_path / "numbers"
    with files.replacing(path) as file:
        file.write(b"one ")
        file.flush()
        assert not path.exists()
        file.write(b"two")
    assert path.read_bytes() == b"one two"
    assert list(tmp_path.iterdir()) == [path]


def test_what_breaks_off_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "numbers"
    files.write_text(path, "old")
    with pytest.raises(ZeroDivisionError), files.replacing(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_work_is_not_one_of_the_file_that_one_process_holds(tmp_path):
    with pytest.raises(FileNotFoundError, match="a record"), files.alone(tmp_path / "taken", ""):
        raise FileNotFoundError("a record")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("name", [255 * "a", 85 * "\u20ac", "b" + 127 * "\xe9", 250 * "a" + "\udcff.npz"])
def test_a_name_may_be_as_long_as_the_file_system_takes(tmp_path, name):
    files.write_text(tmp_path / name, "whole")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.fixture
def little_room():
    """No file of this process grows beyond 1,000 bytes; what is written then fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def noise(path):
    with files.replacing(path) as file:
        np.savez_compressed(file, noise=np.random.RandomState(0).bytes(10_000))


@pytest.mark.parametrize(
    "write",
    [
        noise,
        lambda path: files.write_text(path, "x" * 10_000),
        lambda path: pictures.save_png(path, np.random.default_rng(0).integers(0, 256, (99, 99, 1), np.uint8)),
        lambda path: plots.plot_loss([{"step": 1, "loss": 1.0}], path),
    ],
    ids=["npz", "text", "picture", "plot"],
)
def test_without_room_a_one_line_error_names_the_file_and_the_old_one_stays(tmp_path, little_room, write):
    path = tmp_path / "result"
    path.write_text("old")
    with pytest.raises(OSError, match=r"^/.*result could not be written \(File too large\)$"):
        write(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
