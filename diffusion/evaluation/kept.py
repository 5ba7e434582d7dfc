"""A file of the measurements so far. A call that was stopped goes on from it."""

import logging
from pathlib import Path

import numpy as np
from jaxtyping import Float, Real

from diffusion.data import Source
from diffusion.evaluation.pairs import ImagePairs
from diffusion.runtime import files, processes
from diffusion.runtime.devices import Replicated


def measured(
    pairs: ImagePairs,
    model: Replicated,
    source: Source,
    numbers: Real[np.ndarray, " n"],
    values: Real[np.ndarray, "n k"],
    width: int,
    kept: Path | None,
    desc: str,
    hint: str = "",
) -> Float[np.ndarray, "n k width"]:
    """`width` numbers of each pair, as float32. Pairs on disk are not measured again.

    Args:
        pairs: pairs whose measure is an array [b, width].
        kept: the file in which process 0 keeps the numbers. With it, only process 0 has the full result.
        hint: added to the error message.

    Raises:
        FloatingPointError: the first number of a pair is NaN or Inf.
    """
    shape = (*values.shape, width)
    is_kept = kept is not None and processes.is_first()
    scores = on_disk(kept, shape) if is_kept else np.full(shape, np.nan, np.float32)
    flat = scores.reshape(-1, width)
    is_done = processes.from_first(~np.isnan(flat[:, 0]))
    for of_batch, found in pairs.some(model, source, numbers, values, desc, is_done):
        if bad := [int(numbers[pair // values.shape[1]]) for pair in of_batch[~np.isfinite(found[:, 0])]]:
            raise FloatingPointError(f"{desc}: NaN or Inf for image {bad[0]} of the {source.split} split{hint}")
        is_new = of_batch[~is_done[of_batch]]
        # The first number last: it is what says that a pair is done.
        flat[is_new, 1:] = found[~is_done[of_batch], 1:]
        flat[is_new, 0] = found[~is_done[of_batch], 0]
    return scores


def on_disk(path: Path, shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """A float32 array in a file, which outlives the process. It is NaN at first, or if the file is damaged."""
    if path.exists():
        try:
            kept = np.load(path, mmap_mode="r")  # to write, NumPy would fill a file that is cut with zeros
            if kept.shape == shape and kept.dtype == np.float32:
                return np.load(path, mmap_mode="r+")
        except files.DAMAGE as error:
            logging.warning("%s is damaged (%s); its terms are computed again", path, error)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as file:
        np.save(file, np.full(shape, np.nan, np.float32))
    return np.load(path, mmap_mode="r+")
