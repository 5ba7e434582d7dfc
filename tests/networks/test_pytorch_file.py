"""Damaged PyTorch files whose damage PyTorch does not notice."""

import pickle
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

from diffusion.networks import pytorch_file

RECORDS = {"toy/data.pkl": b"names", "toy/data/0": np.arange(9, dtype=np.float32).tobytes(), "toy/version": b"3"}


class Tensor:
    def detach(self):
        return self


@pytest.fixture
def path(monkeypatch, tmp_path):
    """An archive as PyTorch writes it, and a PyTorch that finds one tensor in whatever it is given."""
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(load=lambda path, **_: {"a": Tensor()}))
    with zipfile.ZipFile(tmp_path / "toy.pt", "w") as archive:
        for name, data in RECORDS.items():
            archive.writestr(name, data)
    return tmp_path / "toy.pt"


def read(path):
    return pytorch_file.state_dict(path, "remedy")


def test_a_flipped_bit_in_a_tensor_is_one_line_that_names_it(path, caplog):
    whole = path.read_bytes()
    assert list(read(path)) == ["a"] and not caplog.text
    place = whole.index(RECORDS["toy/data/0"]) + 5
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(ValueError, match=r"^\S*toy.pt is damaged: wrong CRC-32 of toy/data/0$"):
        read(path)


def test_a_flipped_byte_anywhere_is_one_line_or_in_no_tensor(path):
    whole = path.read_bytes()
    for place in range(0, len(whole), 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x11]) + whole[place + 1 :])
        try:
            read(path)
        except ValueError as error:
            assert str(error).startswith(f"{path} is damaged: ") and "\n" not in str(error), place
        else:
            assert RECORDS["toy/data/0"] in path.read_bytes(), place


def test_a_file_without_checksums_is_read_with_a_warning(path, caplog):
    whole = path.read_bytes()
    for data in RECORDS.values():
        crc = zipfile.crc32(data).to_bytes(4, "little")
        assert whole.count(crc) == 2
        whole = whole.replace(crc, bytes(4))
    path.write_bytes(whole)
    assert list(read(path)) == ["a"]
    assert "toy.pt was written without checksums, so damage is not noticed" in caplog.text


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (b"", r"toy.pt is empty$"),
        (None, r"toy.pt is damaged: it is truncated$"),
        (b"<html>", r"toy.pt is not a PyTorch state_dict: it does not hold only tensors$"),
    ],
)
def test_what_pytorch_refuses_is_told_without_its_advice_to_unpickle(held, message, path, monkeypatch):
    def load(path, **_):
        raise pickle.UnpicklingError("Weights only load failed. Re-running with `weights_only` set to `False` will")

    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(load=load))
    path.write_bytes(path.read_bytes()[:-1] if held is None else held)
    with pytest.raises(ValueError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (["a"], "it has no names"),
        ({1: Tensor()}, "it has no names"),
        ({"a": Tensor(), "model": {}, "step": 3}, "these are not tensors: model; step"),
    ],
)
def test_what_is_no_state_dict_says_why(state, message, path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(load=lambda path, **_: state))
    with pytest.raises(ValueError, match=f"toy.pt is not a PyTorch state_dict: {message}$"):
        read(path)


def test_what_is_no_archive_is_left_to_pytorch(path):
    path.write_bytes(b"a file of before 1.6")
    assert list(read(path)) == ["a"]
