"""The choice of the images that are scored."""

import numpy as np
from jaxtyping import Int

from diffusion.likelihood import PROTOCOLS

NONE = -1  # eval.num_images of a run that is not scored


def num_scored(wanted: int, protocol: str, num_test: int) -> int:
    """The number of test images that are scored. It is also the most training images that are scored.

    Args:
        wanted: eval.num_images; 0 for all, -1 for none.
        protocol: eval.protocol.
        num_test: how many test images there are.

    Raises:
        ValueError: there are no test images, or fewer than are wanted or than the protocol needs.
    """
    if wanted == NONE:
        return 0
    if not num_test:
        raise ValueError(f"eval.num_images={wanted}: the test split has no images; -1 trains without scoring")
    num_images = wanted or num_test
    if num_images > num_test:
        raise ValueError(f"eval.num_images={wanted} exceeds the {num_test} images of the test split")
    multiple = PROTOCOLS[protocol].images_multiple
    if num_images < multiple:
        raise ValueError(
            f"eval.protocol={protocol!r} scores multiples of {multiple} images, "
            f"not {num_images} (eval.num_images={wanted}, {num_test} test images)"
        )
    return num_images // multiple * multiple


def of_test_split(wanted: int, protocol: str, num_test: int) -> Int[np.ndarray, " n"]:
    """The numbers of the test images that are scored: a fixed random choice, or all.

    If all are wanted, the protocol drops the last ones. Raises the errors of `num_scored`.
    """
    num_images = num_scored(wanted, protocol, num_test)
    return np.arange(num_images) if wanted == 0 else subset(num_test, num_images)


def subset(num_existing: int, num_images: int) -> Int[np.ndarray, " {num_images}"]:
    """The numbers of a fixed random choice of images. (The first images of a set sorted by class are of one class.)
    """
    return np.sort(np.random.RandomState(0).permutation(num_existing)[:num_images])
