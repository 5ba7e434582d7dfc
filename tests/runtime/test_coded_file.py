"""The file of compressed images: its contents come back, and every changed byte is noticed."""

import zlib

import numpy as np
import pytest

from diffusion.runtime import coded_file
from diffusion.runtime.coded_file import Header

HEADER = Header(
    weights=b"wxyz", config=b"conf", device="NVIDIA H100 80GB HBM3", jax_version="0.10.1", floats=b"\0\1\2\3", dtype=1,
    precision=3, batch_size=64, num_images=10_000, height=32, width=127, channels=128, num_levels=256,
    pixels=b"pixl", initial_words=300,
)  # fmt: skip
WORDS = np.random.default_rng(0).integers(0, 2**32, 8, np.uint32)


@pytest.fixture
def path(tmp_path):
    coded_file.write(tmp_path / "images.ddc", HEADER, WORDS)
    return tmp_path / "images.ddc"


def test_what_is_written_comes_back(path):
    header, words = coded_file.read(path)
    assert header == HEADER
    np.testing.assert_array_equal(words, WORDS)
    assert words.dtype == np.uint32 and path.stat().st_size < 4 * len(WORDS) + 80


def test_every_flipped_bit_is_noticed(path):
    data = path.read_bytes()
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(ValueError, match="damaged"):
                coded_file.read(path)


@pytest.mark.parametrize("keep", [0, 3, 7, 8, 30, -1])
def test_a_file_that_was_cut_off_is_noticed(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="damaged"):
        coded_file.read(path)


def test_another_version_is_named(path):
    data = path.read_bytes()
    other = b"DDC\2" + data[8:]
    path.write_bytes(other[:4] + zlib.crc32(other).to_bytes(4, "little") + other[4:])
    with pytest.raises(ValueError, match="version 2 of the format; this program reads version 1"):
        coded_file.read(path)
