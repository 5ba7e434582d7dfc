"""CRC-32C (Castagnoli) in NumPy, the checksum in the files of LevelDB and TensorFlow."""

from functools import cache

import numpy as np
from jaxtyping import UInt32

POLYNOMIAL = np.uint32(0x82F63B78)  # with its bits reversed
ONES = 0xFFFFFFFF
LANES = 1 << 12
BYTES_PER_LANE = 64  # more only where data exceed LANES · 64 bytes


def masked_crc32c(data: bytes) -> int:
    """The CRC-32C as LevelDB stores it: rotated by 15 bits, plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & ONES


def crc32c(data: bytes) -> int:
    """The CRC-32C of these bytes.

    A register that starts at 0 is linear in the bytes, and leading zeros do not change it. So the bytes are cut into
    lanes of equal length. Their registers advance in parallel, two bytes at a time, and are then joined.
    """
    lanes = min(LANES, 1 << (len(data) // BYTES_PER_LANE).bit_length())
    words = max(1, -(-len(data) // (2 * lanes)))  # of each lane
    padded = np.zeros(2 * lanes * words, np.uint8)
    padded[padded.size - len(data) :] = np.frombuffer(data, np.uint8)
    register, table = np.zeros(lanes, np.uint32), _table()
    for word in np.ascontiguousarray(padded.view("<u2").reshape(lanes, words).T):
        register = table[(register ^ word) & 0xFFFF] ^ (register >> 16)
    length = 2 * words
    while len(register) > 1:
        register = _applied(_zeros(length), register[::2]) ^ register[1::2]
        length *= 2
    start = _applied(_zeros(len(data)), np.array([ONES], np.uint32))  # the real register starts at all ones
    return int(register[0] ^ start[0]) ^ ONES


def _shifted(register: UInt32[np.ndarray, " n"], num_bits: int) -> UInt32[np.ndarray, " n"]:
    """The registers after this many zero bits."""
    for _ in range(num_bits):
        register = (register >> 1) ^ (register & 1) * POLYNOMIAL
    return register


@cache
def _table() -> UInt32[np.ndarray, " n"]:
    """A register after two zero bytes, for each value of its lower 16 bits."""
    return _shifted(np.arange(1 << 16, dtype=np.uint32), 16)


@cache
def _zeros(num_bytes: int) -> UInt32[np.ndarray, "32"]:
    """The effect of this many zero bytes on a register: a matrix over GF(2), each column as one integer."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    if num_bytes == 0:
        return bits
    half = _zeros(num_bytes // 2)
    both = _applied(half, half)
    return _shifted(both, 8) if num_bytes % 2 else both


def _applied(matrix: UInt32[np.ndarray, "32"], registers: UInt32[np.ndarray, " n"]) -> UInt32[np.ndarray, " n"]:
    products = [column * (registers >> bit & 1) for bit, column in enumerate(matrix)]
    return np.bitwise_xor.reduce(products)
