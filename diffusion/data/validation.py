"""Training images that are set aside. A choice of a checkpoint or a recipe sees these, not the test images.

An image's own pixel values decide whether it is set aside. So every run with the same data set and `data.validation`
has the same validation images, wherever the files are and in whatever order. A_TENTH takes either all or none of
several equal images.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool

from diffusion.data.source import Source

A_TENTH = -1  # data.validation for the images whose digest is in the lowest tenth of all digests


def split_off(source: Source, wanted: int) -> tuple[Source, Source]:
    """Splits the training split into images to train on and images that are set aside.

    Args:
        source: the training split.
        wanted: data.validation. A number takes that many images, with the lowest digests. A_TENTH takes a number that
            varies with the pictures, but new pictures do not move the others.

    Raises:
        ValueError: no image would be left to train on.
    """
    aside = set_aside(source, wanted) if wanted else np.zeros(len(source), bool)
    if aside.all():
        raise ValueError(f"data.validation={wanted} leaves none of the {len(source)} training images to train on")
    left = dataclasses.replace(source, chosen=np.flatnonzero(~aside)) if wanted else source
    return left, dataclasses.replace(source, split="validation", chosen=np.flatnonzero(aside))


def set_aside(source: Source, wanted: int) -> Bool[np.ndarray, " n"]:
    """Which images of the training split are validation images. The arguments are those of `split_off`."""
    digests = source.image_digests()
    if wanted == A_TENTH:
        return digests < np.uint64(2**64 // 10)
    aside = np.zeros(len(source), bool)
    aside[np.argsort(digests, kind="stable")[:wanted]] = True
    return aside
