"""CRC-32C (Castagnoli), by NumPy: what LevelDB and TensorFlow check their files with."""

from functools import cache

import numpy as np
from jaxtyping import UInt32

POLYNOMIAL = np.uint32(0x82F63B78)  # its bits reversed
ONES = 0xFFFFFFFF
LANES = 1 << 12
BYTES_PER_LANE = 64  # at least, of many bytes


def masked_crc32c(data: bytes) -> int:
    """CRC-32C as LevelDB stores it: rotated by 15 bits, and a constant added."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & ONES


def crc32c(data: bytes) -> int:
    """The CRC-32C of these bytes.

    A register that starts at 0 is linear in the bytes, and zeros in front of them change nothing. So the bytes are
    cut into lanes of one length, whose registers advance side by side, two bytes at a time, and are then joined.
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
    """Registers after so many bits that are 0."""
    for _ in range(num_bits):
        register = (register >> 1) ^ (register & 1) * POLYNOMIAL
    return register


@cache
def _table() -> UInt32[np.ndarray, " n"]:
    """What two bytes make of a register."""
    return _shifted(np.arange(1 << 16, dtype=np.uint32), 16)


@cache
def _zeros(num_bytes: int) -> UInt32[np.ndarray, "32"]:
    """What so many bytes that are 0 do to a register: a matrix over GF(2), each column as one integer."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    if num_bytes == 0:
        return bits
    half = _zeros(num_bytes // 2)
    both = _applied(half, half)
    return _shifted(both, 8) if num_bytes % 2 else both


def _applied(matrix: UInt32[np.ndarray, "32"], registers: UInt32[np.ndarray, " n"]) -> UInt32[np.ndarray, " n"]:
    products = [column * (registers >> bit & 1) for bit, column in enumerate(matrix)]
    return np.bitwise_xor.reduce(products)
