"""Images: data sets through TensorFlow Datasets (TFDS), read without TensorFlow.

`load` returns a split as a `Source`, and `describe` describes a set without reading an image. `batch_indices` gives the
examples of a training step. `validation.split_off` sets training images aside.
"""

from diffusion.data.batches import batch_indices
from diffusion.data.source import Description, Source, describe, load

__all__ = ["Description", "Source", "batch_indices", "describe", "load"]
