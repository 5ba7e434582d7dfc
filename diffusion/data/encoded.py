"""Pictures that stay encoded: a substitute for the array of pixel values that decodes pictures on demand."""

import dataclasses
import functools
import hashlib
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Int, UInt8, UInt64

from diffusion.data import decoders

# Reading a file and decoding a picture release Python's lock. More threads than cores hide the latency of the disk.
THREADS = max(16, decoders.num_cores())
PER_TASK = 16  # pictures, at most


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """Pictures of one shape in record files.

    Attributes:
        shape: [N, H, W, C].
        numbers: the record number of each of the N.
        picture: a function from a record number to pixel values; several threads call it at once.
        digests: the digest of each picture's pixel values: see `image_digests`.
        known_sha256: known digests of all pixel values and labels, by `Content.key`.
    """

    shape: tuple[int, ...]
    numbers: Int[np.ndarray, " n"]
    picture: Callable[[int], UInt8[np.ndarray, "h w c"]]
    digests: UInt64[np.ndarray, " n"]
    known_sha256: dict[str, str]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, indices: Int[np.ndarray, "*b"] | slice) -> UInt8[np.ndarray, "*b h w c"]:
        """These pictures. Each of them is decoded once."""
        wanted = self.numbers[indices]
        once, places = np.unique(wanted, return_inverse=True)
        repeats = len(once) < wanted.size
        numbers = (once if repeats else wanted.ravel()).tolist()
        pixels = np.empty((len(numbers), *self.shape[1:]), np.uint8)

        def fill(begin: int) -> None:
            for place, number in enumerate(numbers[begin : begin + length], begin):
                pixels[place] = self.picture(number)

        length = min(PER_TASK, -(-len(numbers) // THREADS) or 1)
        for _ in self._threads.map(fill, range(0, len(numbers), length)):
            pass  # an error is raised here
        return (pixels[places.ravel()] if repeats else pixels).reshape(*wanted.shape, *self.shape[1:])

    @functools.cached_property
    def _threads(self) -> ThreadPoolExecutor:
        # Pillow warns of harmless oddities. `warnings.catch_warnings` works in one thread only.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        return ThreadPoolExecutor(THREADS, thread_name_prefix="decode")


def image_digests(images: Iterable[UInt8[np.ndarray, "h w c"]]) -> UInt64[np.ndarray, " n"]:
    """A number for each image that depends on its pixel values alone."""
    found = [hashlib.blake2b(image, digest_size=8).digest() for image in images]
    return np.frombuffer(b"".join(found), ">u8").astype(np.uint64)
