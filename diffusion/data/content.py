"""The digest of a split's contents: shape, levels, pixel values and labels, however they are stored."""

import hashlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32


class Content(NamedTuple):
    """All that the digest depends on besides pixel values and labels."""

    shape: tuple[int, ...]
    num_levels: int
    num_classes: int

    @property
    def _about(self) -> str:
        return f"{self.shape} {self.num_levels} {self.num_classes}\n"

    def begin(self) -> "hashlib._Hash":
        """The new digest. Update it with the pixel values in order."""
        return hashlib.sha256(self._about.encode())

    def end(self, digest: "hashlib._Hash", classes: Int32[np.ndarray, " n"] | None) -> str:
        """The final digest, after all pixel values."""
        digest.update(_bytes(classes))
        return digest.hexdigest()

    def key(self, classes: Int32[np.ndarray, " n"] | None) -> str:
        """The key under which a digest is kept: all that it depends on except the pixel values."""
        return f"{self._about}{hashlib.sha256(_bytes(classes)).hexdigest()}"


def _bytes(classes: Int32[np.ndarray, " n"] | None) -> bytes:
    return b"" if classes is None else np.ascontiguousarray(classes, np.int32).tobytes()
