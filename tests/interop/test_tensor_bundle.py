"""TensorFlow's tensor bundles, built from bytes here: damaged or unsupported ones print one line."""

import struct
from pathlib import Path

import numpy as np
import pytest

from diffusion.interop import tensor_bundle
from diffusion.interop.crc32c import masked_crc32c

VALUES = np.arange(6, dtype="<f4").reshape(2, 3)


def varint(number):
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


def integer(field, value):
    return bytes([field << 3]) + varint(value)


def text(field, value):
    return bytes([field << 3 | 2]) + varint(len(value)) + value


def entry(values, dtype=1):
    """A BundleEntryProto, of the first bytes of shard 0."""
    shape = b"".join(text(2, integer(1, size)) for size in values.shape)
    crc = bytes([6 << 3 | 5]) + struct.pack("<I", masked_crc32c(values.tobytes()))
    return integer(1, dtype) + text(2, shape) + integer(5, values.nbytes) + crc


def block(pairs, kind=0):
    """A block with one restart, and its trailer."""
    held = b"".join(bytes([0]) + varint(len(key)) + varint(len(value)) + key + value for key, value in pairs)
    held += struct.pack("<II", 0, 1)
    return held + bytes([kind]) + struct.pack("<I", masked_crc32c(held + bytes([kind])))


def index(header=integer(1, 1), entries=((b"a", entry(VALUES)),), kind=0):  # noqa: B008
    """A table in LevelDB's format: blocks of pairs, of nothing and of where the first is, and the footer."""
    pairs = block([(b"", header), *entries], kind)
    table, handles = pairs + block([]), []
    handles.append(varint(len(pairs)) + varint(len(table) - len(pairs) - tensor_bundle.TRAILER))
    own = block([(b"z", varint(0) + varint(len(pairs) - tensor_bundle.TRAILER))])
    handles.append(varint(len(table)) + varint(len(own) - tensor_bundle.TRAILER))
    footer = b"".join(handles).ljust(tensor_bundle.FOOTER - 8, b"\0") + struct.pack("<Q", tensor_bundle.MAGIC)
    return table + own + footer


@pytest.fixture
def read(tmp_path):
    """A function of an index's bytes: the tensors of the bundle."""
    (tmp_path / "x.data-00000-of-00001").write_bytes(VALUES.tobytes())

    def read(held):
        Path(tmp_path / "x.index").write_bytes(held)
        bundle = tensor_bundle.open_bundle(tmp_path / "x")
        return tensor_bundle.read(bundle, bundle.entries)

    return read


def test_it_is_read(read):
    (found,) = read(index()).items()
    assert found[0] == "a"
    np.testing.assert_array_equal(found[1], VALUES, strict=True)


BIG_ENDIAN = integer(1, 1) + integer(2, 1)
MANY_BYTES = text(2, text(2, integer(1, 2**64 - 1)))  # a size of −1, which means unknown


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (index(BIG_ENDIAN), "x.index: its tensors are big-endian"),
        (index(kind=1), "x.index: its blocks are compressed, which cannot be read"),
        (index(b""), "x.index: it is not a tensor bundle: the header is missing"),
        (index(bytes([0xFF])), r"x.index: it is damaged \(IndexError\)"),
        (index(bytes([0x0B])), "x.index: it is damaged: not a protocol buffer"),
        (index(entries=[(b"a", entry(VALUES, dtype=19))]), "x.index: dtypes that cannot be read: a is 19"),
        (index(entries=[(b"a", entry(VALUES, dtype=2))]), r"00001: a is \(2, 3\), but has 24 bytes"),
        (index(entries=[(b"a", integer(1, 1) + MANY_BYTES)]), r"00001: a is \(\d+,\), but has 0 bytes"),
        (index(entries=[(b"a", entry(VALUES) + integer(3, 1))]), "x.data-00001-of-00001 does not exist"),
        (index(entries=[(b"a", entry(VALUES) + integer(4, 8))]), "a is truncated: the file ends 8 bytes too early"),
        (index(entries=[(b"a", entry(VALUES) + text(7, b""))]), "x.index: stored in parts, which cannot be read: a"),
    ],
)
def test_what_cannot_be_read_is_one_line(read, held, message):
    with pytest.raises((ValueError, FileNotFoundError), match=f"^[^\n]*{message}$"):
        read(held)


def test_an_index_that_is_cut_or_has_a_flipped_bit_is_one_line_or_the_same(read):
    whole = index()
    cut = [whole[:size] for size in range(0, len(whole), 5)]
    flipped = [whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :] for place in range(0, len(whole), 2)]
    refused = 0
    for held in cut + flipped:
        try:
            found = read(held)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
        else:  # where no reader looks
            np.testing.assert_array_equal(found["a"], VALUES, strict=True)
    assert refused > len(cut + flipped) / 2
