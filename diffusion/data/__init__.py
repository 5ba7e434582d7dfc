"""Pictures in: data sets through TensorFlow Datasets (TFDS), read without TensorFlow.

`load` gives a whole split as one uint8 array, `describe` says what a set holds without touching a picture,
and `batch_indices` says which examples make up a training step.
"""

from diffusion.data.batches import batch_indices
from diffusion.data.images import Description, ImageSet, describe, load

__all__ = ["Description", "ImageSet", "batch_indices", "describe", "load"]
