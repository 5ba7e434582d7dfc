"""Pictures in: data sets through TensorFlow Datasets (TFDS), read without TensorFlow.

`load` gives a split as a `Source`, `describe` says what a set holds without touching a picture, and `batch_indices`
says which examples make up a training step. `validation.split_off` sets training images aside.
"""

from diffusion.data.batches import batch_indices
from diffusion.data.source import Description, Source, describe, load

__all__ = ["Description", "Source", "batch_indices", "describe", "load"]
