"""The loop over pairs of an image and a t, or another value. Everything measured per image runs here."""

from collections.abc import Callable, Iterator

import jax
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree, Real

from diffusion import continuous_time, guidance, likelihood
from diffusion.data import Source
from diffusion.data.levels import to_unit
from diffusion.likelihood import Measure
from diffusion.model import Model
from diffusion.reporting.progress import Progress
from diffusion.runtime import devices, randomness
from diffusion.runtime.devices import Replicated

Measured = Iterator[tuple[np.ndarray, PyTree]]
# Accelerators multiply float32 in bfloat16 or TF32 unless they are told not to; likelihoods need every digit.
PRECISION = "highest"


class ImagePairs:
    """Measures pairs of any images and any values, in batches, by one compiled program.

    Args:
        measure: (model, labels [b] or None, x0 [b, H, W, C], keys [b], values [b]) -> a tree of arrays [b, ...]. The
            key of an image depends only on its number in its split.
        seed: the seed of the keys.
        batch_size: the number of pairs at a time, over all devices.
        stream: the stream of the keys, one of `randomness.STREAMS`.
        stop: called after each batch; raises to stop.
        unit: the name of a pair.
    """

    def __init__(
        self,
        measure: Callable[[Model, Array | None, Array, Array, Array], PyTree],
        seed: int,
        batch_size: int,
        stream: str,
        stop: Callable[[], None] | None = None,
        unit: str = "term",
    ):
        seed_key = randomness.stream(seed, stream)

        def one_batch(shared: PyTree, items: tuple[Array, Array | None, Array, Array]) -> PyTree:
            model, split_number = shared
            images, labels, numbers, values = items
            x0 = to_unit(images, model.num_levels)
            keys = randomness.per_item(jax.random.fold_in(seed_key, split_number), numbers)
            with jax.default_matmul_precision(PRECISION):
                return measure(model, labels, x0, keys, values)

        self._batches = devices.over_batches(one_batch)
        self._batch_size, self._stop, self._unit = batch_size, stop, unit

    def some(
        self,
        model: Replicated,
        source: Source,
        numbers: Int[np.ndarray, " n"],
        values: Real[np.ndarray, "n k"],
        desc: str,
        is_done: Bool[np.ndarray, " pairs"] | None = None,
    ) -> Measured:
        """Measures the n × k pairs: image numbers[i] with values[i, j] is pair i·k + j.

        Args:
            is_done: whether each pair is done. A batch with only such pairs is left out. The batches are always those
                of all pairs, so a value has the same bits whatever was done before.

        Returns:
            An iterator of (the pairs that are measured [b], their measures [b, ...]), batch by batch.
        """
        labels = source.labels(numbers) if model.leaves.takes_labels else None

        def load(items: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray]:
            """The inputs of the devices. Only the images of their own pairs are read, each of them once."""
            image, values = items
            of_batch, which = np.unique(image, return_inverse=True)
            images = source.images(numbers[of_batch])[which.reshape(image.shape)]
            return images, None if labels is None else labels[image], numbers[image], values

        shared = model, devices.replicate(np.int32(source.split_number))
        items = np.arange(values.size) // values.shape[1], values.ravel()
        is_done = np.zeros(values.size, bool) if is_done is None else is_done
        with Progress(values.size, initial=int(is_done.sum()), desc=desc, unit=self._unit) as progress:
            for measured, measures in self._batches(shared, items, self._batch_size, load, is_done):
                yield measured, measures
                progress.update(int((~is_done[measured]).sum()))
                if self._stop is not None:
                    self._stop()

    def all(
        self,
        model: Replicated,
        source: Source,
        numbers: Int[np.ndarray, " n"],
        values: Real[np.ndarray, "n k"],
        desc: str,
    ) -> PyTree:
        """Measures every pair and returns a tree of float64 arrays [n, k, ...]."""
        found = [measures for _, measures in self.some(model, source, numbers, values, desc)]

        def joined(*parts: np.ndarray) -> np.ndarray:
            whole = np.concatenate(parts).astype(np.float64)
            return whole.reshape(*values.shape, *whole.shape[1:])

        return jax.tree.map(joined, *found)


class ImageTimePairs(ImagePairs):
    """Measures (image, t) pairs of any images and any t, in batches, by one compiled program.

    A real t is an instant of continuous time. The ε of a pair depends only on the image's number in its split and on
    the step of t, not on the rest of the batch. A model with labels gets the image's own label.

    Args:
        measure_of: model -> the measure, for example `likelihood.term_and_x0_mse`.
        stream: the stream of the noise. By default it is the evaluation's, so that a study can repeat its terms. The
            other arguments are those of `ImagePairs`.
    """

    def __init__(
        self,
        measure_of: Callable[[Model], Measure],
        seed: int,
        batch_size: int,
        stream: str = "eval",
        stop: Callable[[], None] | None = None,
    ):
        def measure(model: Model, labels: Array | None, x0: Array, keys: Array, t: Array) -> PyTree:
            denoise = guidance.conditional(model.denoise, labels) if model.takes_labels else model.denoise
            rows = continuous_time.rows(model.schedule, t)
            return likelihood.at_one_t(denoise, rows, x0, keys, measure_of(model))

        super().__init__(measure, seed, batch_size, stream, stop)


def every_t(num_images: int, num_steps: int) -> Int[np.ndarray, "n t"]:
    """t = 1…T for each of so many images."""
    return np.tile(np.arange(1, num_steps + 1), (num_images, 1))
