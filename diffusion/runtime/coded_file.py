"""The file of --mode=compress: a header about the model and the images, a checksum of every byte, and the coded bits.

    4 bytes   "DDC" and the version of this format
    4 bytes   CRC-32 of all other bytes; it finds every change within 32 bits in a row
    then      the header's fields in their order: digests of 4 bytes, numbers as LEB128, texts after their length
    to the end   the body: words of 32 bits, little-endian

The header is short, about 40 bytes, because it counts as a part of the file. A digest of 4 bytes accepts a wrong value
once in 4e9 times.
"""

import dataclasses
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt32

from diffusion.runtime import files

MAGIC, VERSION = b"DDC", 1
DIGEST_BYTES = 4
DTYPES = ("float32", "bfloat16", "float16")
_CHECKSUM = slice(4, 8)


@dataclasses.dataclass(frozen=True)
class Header:
    """Values that must be equal where the file is decoded, and values that the decoder needs.

    Attributes:
        weights, config: digests of the model's weights, and of the config keys that give them their meaning.
        device, jax_version: the device and JAX version that ran the network, such as "cpu" and "0.10.1".
        floats: digest of the network's output there for a fixed input.
        dtype: the dtype of the network's computations, as its index in DTYPES.
        precision, batch_size: the settings of the codec.
        num_images, height, width, channels, num_levels: the shape and levels of the images.
        pixels: digest of the images.
        initial_words: the number of random words in the body.
    """

    weights: bytes
    config: bytes
    device: str
    jax_version: str
    floats: bytes
    dtype: int
    precision: int
    batch_size: int
    num_images: int
    height: int
    width: int
    channels: int
    num_levels: int
    pixels: bytes
    initial_words: int


def write(path: Path, header: Header, words: UInt32[np.ndarray, " n"]) -> None:
    """Writes the file, completely or not at all."""
    fields = b"".join(_packed(getattr(header, field.name)) for field in dataclasses.fields(Header))
    content = fields + words.astype("<u4").tobytes()
    start = MAGIC + bytes([VERSION])
    with files.replacing(path) as file:
        file.write(start + _crc(start + content) + content)


def read(path: Path) -> tuple[Header, UInt32[np.ndarray, " n"]]:
    """The header and the body.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file, has another version, or is damaged.
    """
    data = path.read_bytes()
    if data[:3] != MAGIC:
        raise ValueError(f"{path} was not made by --mode=compress, or is damaged")
    if data[_CHECKSUM] != _crc(data[:4] + data[8:]):
        raise ValueError(f"{path} is damaged: its checksum is not that of its content")
    if data[3] != VERSION:
        raise ValueError(f"{path} has version {data[3]} of the format; this program reads version {VERSION}")
    position, values = 8, []
    for field in dataclasses.fields(Header):
        value, position = _unpacked(field.type, data, position)
        values.append(value)
    return Header(*values), np.frombuffer(data[position:], "<u4").astype(np.uint32)


def _crc(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "little")


def _packed(value: int | str | bytes) -> bytes:
    if isinstance(value, bytes):
        return value
    return _leb128(value) if isinstance(value, int) else _leb128(len(value.encode())) + value.encode()


def _unpacked(kind: type, data: bytes, position: int) -> tuple[int | str | bytes, int]:
    """A field, and where the next one begins."""
    if kind is bytes:
        return data[position : position + DIGEST_BYTES], position + DIGEST_BYTES
    number, position = _leb128_at(data, position)
    return (number, position) if kind is int else (data[position : position + number].decode(), position + number)


def _leb128(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the highest bit says whether another byte follows."""
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


def _leb128_at(data: bytes, position: int) -> tuple[int, int]:
    number = shift = 0
    while data[position] & 0x80:
        number |= (data[position] & 0x7F) << shift
        position, shift = position + 1, shift + 7
    return number | data[position] << shift, position + 1
