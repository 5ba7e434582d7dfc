"""Safetensors of a few numbers: a damaged or duplicate tensor, or one with NaN or Inf, is named in one line."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from diffusion.interop import files

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}


@pytest.fixture
def path(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def test_a_tensor_in_two_shards_is_refused(path):
    np.testing.assert_array_equal(files.read([path], TENSORS)["a"], TENSORS["a"], strict=True)
    other = path.with_name("y.safetensors")
    save_file({"b": 2 * TENSORS["b"]}, other)
    with pytest.raises(ValueError, match=r"x.safetensors: in more than one of the files: b$"):
        files.read([path, other], TENSORS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named_in_half_precision_too(path, value):
    save_file(TENSORS | {"b": np.array([1, value, 1, 1], np.float16)}, path)
    with pytest.raises(ValueError, match=r"x.safetensors: NaN or Inf in b$"):
        files.read([path], TENSORS)


def test_a_file_that_is_cut_or_whose_header_has_a_flipped_bit_is_one_line(path):
    whole = path.read_bytes()
    data = sum(tensor.nbytes for tensor in TENSORS.values())
    cut = [whole[:size] for size in range(len(whole))]
    places = range(0, len(whole) - data, 2)
    flipped = [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in places]
    for held in cut + flipped:
        path.write_bytes(held)
        with pytest.raises(ValueError, match=r"^\S*x.safetensors: [^\n]*$"):
            files.read([path], TENSORS)
