"""Reads TensorFlow's tensor bundles without TensorFlow: PREFIX.index and PREFIX.data-00000-of-00001.

The index is a table in LevelDB's format, from names to the positions of the tensors' bytes. Its blocks and every tensor
carry a CRC-32C, which is checked. Formats: LevelDB's table_format.md; TensorFlow's tensor_bundle.proto and types.proto.
"""

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion.interop.crc32c import masked_crc32c
from diffusion.networks.named_tensors import first_few

MAGIC = 0xDB4775248B80FB57  # of LevelDB's tables
FOOTER, TRAILER = 48, 5  # bytes: at the end of the file, and after each block
DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8"}  # types.proto; tensors of other dtypes are allowed, but not read


class Entry(NamedTuple):
    """The dtype and shape of a tensor, and its position: the shard, the first byte and the number of bytes."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    is_sliced: bool


class Bundle(NamedTuple):
    """The contents of an index."""

    prefix: Path
    num_shards: int
    entries: dict[str, Entry]


def open_bundle(prefix: Path) -> Bundle:
    """Reads the index of a bundle.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: the index is damaged, truncated, compressed or big-endian; the message is one line.
    """
    path = Path(f"{prefix}.index")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        pairs = dict(_table(path.read_bytes()))
        header = _fields(pairs.pop(b"", b""))
        if header.get(2, [0])[-1]:
            raise ValueError("its tensors are big-endian")
        num_shards = header.get(1, [0])[-1]
        if not num_shards:
            raise ValueError("it is not a tensor bundle: the header is missing")
        # The keys of parts of tensors are not text.
        entries = {name.decode(errors="backslashreplace"): _entry(value) for name, value in pairs.items()}
    except (IndexError, TypeError, struct.error) as error:
        raise ValueError(f"{path}: it is damaged ({type(error).__name__})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Bundle(prefix, num_shards, entries)


def read(bundle: Bundle, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Reads these tensors and checks each against its CRC-32C.

    Raises:
        FileNotFoundError: a data file is missing.
        ValueError: a tensor is truncated, damaged, stored in parts, or of a dtype that is not in DTYPES; one line names
            it.
    """
    tensors = {}
    wanted = {name: bundle.entries[name] for name in names}
    if bad := sorted(name for name, entry in wanted.items() if entry.is_sliced):
        raise ValueError(f"{bundle.prefix}.index: stored in parts, which cannot be read: {first_few(bad)}")
    kinds = [f"{name} is {entry.dtype}" for name, entry in wanted.items() if entry.dtype not in DTYPES]
    if kinds:
        raise ValueError(f"{bundle.prefix}.index: dtypes that cannot be read: {first_few(sorted(kinds))}")
    for shard in sorted({entry.shard for entry in wanted.values()}):
        path = Path(f"{bundle.prefix}.data-{shard:05d}-of-{bundle.num_shards:05d}")
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        with path.open("rb") as file:
            for name, entry in wanted.items():
                if entry.shard == shard:
                    file.seek(entry.offset)
                    tensors[name] = _tensor(f"{path}: {name}", entry, file.read(entry.size))
    return tensors


def _tensor(where: str, entry: Entry, data: bytes) -> np.ndarray:
    dtype = np.dtype(DTYPES[entry.dtype])
    if entry.size != dtype.itemsize * int(np.prod(entry.shape)):
        raise ValueError(f"{where} is {entry.shape}, but has {entry.size} bytes")
    if len(data) < entry.size:
        raise ValueError(f"{where} is truncated: the file ends {entry.size - len(data)} bytes too early")
    if masked_crc32c(data) != entry.crc:
        raise ValueError(f"{where} is damaged: its CRC-32C is wrong")
    return np.frombuffer(data, dtype).reshape(entry.shape)


def _entry(value: bytes) -> Entry:
    """A BundleEntryProto."""
    fields = _fields(value)
    dtype, shard, offset, size, crc = (fields.get(number, [0])[-1] for number in (1, 3, 4, 5, 6))
    dims = _fields(fields.get(2, [b""])[-1]).get(2, [])  # of a TensorShapeProto
    shape = tuple(_fields(dim).get(1, [0])[-1] for dim in dims)
    return Entry(dtype, shape, shard, offset, size, crc, 7 in fields)


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the keys and values of a table in LevelDB's format."""
    footer = data[-FOOTER:]
    if len(footer) < FOOTER or struct.unpack("<Q", footer[-8:])[0] != MAGIC:
        raise ValueError("it is truncated, or not the index of a tensor bundle")
    _, place = _handle(footer, 0)  # of the meta index, which holds nothing here
    (offset, size), _ = _handle(footer, place)
    for _, handle in _pairs(_block(data, offset, size)):
        yield from _pairs(_block(data, *_handle(handle, 0)[0]))


def _handle(data: bytes, place: int) -> tuple[tuple[int, int], int]:
    """The offset and size of a block, and the position after them."""
    offset, place = _varint(data, place)
    size, place = _varint(data, place)
    return (offset, size), place


def _block(data: bytes, offset: int, size: int) -> bytes:
    trailer = data[offset + size : offset + size + TRAILER]
    if len(trailer) < TRAILER:
        raise ValueError("it is damaged: a block lies outside the file")
    if masked_crc32c(data[offset : offset + size + 1]) != struct.unpack("<I", trailer[1:])[0]:
        raise ValueError("it is damaged: the CRC-32C of a block is wrong")
    if trailer[0]:
        raise ValueError("its blocks are compressed, which cannot be read")
    return data[offset : offset + size]


def _pairs(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the keys and values of a block. A key is stored without the prefix that it shares with the last key."""
    end = len(block) - 4 * (1 + struct.unpack("<I", block[-4:])[0])  # before the list of restarts
    place, key = 0, b""
    while place < end:
        shared, place = _varint(block, place)
        own, place = _varint(block, place)
        size, place = _varint(block, place)
        key = key[:shared] + block[place : place + own]
        place += own
        yield key, block[place : place + size]
        place += size


def _fields(message: bytes) -> dict[int, list[Any]]:
    """The fields of a protocol buffer by number: integers, or bytes for fields with a length."""
    fields: dict[int, list[Any]] = {}
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        kind = tag & 7
        if kind == 0:
            value, place = _varint(message, place)
        elif kind == 2:
            size, place = _varint(message, place)
            value, place = message[place : place + size], place + size
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, place = int.from_bytes(message[place : place + size], "little"), place + size
        else:
            raise ValueError("it is damaged: not a protocol buffer")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """The integer at this position, and the position after it."""
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, place
