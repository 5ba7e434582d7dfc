"""The choice of images to score."""

import numpy as np
import pytest

from diffusion.evaluation import images


@pytest.mark.parametrize(
    ("wanted", "protocol", "num_test", "scored"),
    [
        (0, "exact", 299, 299),
        (20, "exact", 299, 20),
        (0, "ho2020", 10_000, 9_984),  # as the original code: the remainder of 256 is dropped
        (1000, "ho2020", 10_000, 768),
        (256, "ho2020", 299, 256),
        (0, "nichol2021", 10_000, 10_000),
        (-1, "ho2020", 299, 0),
    ],
)
def test_how_many_images_a_protocol_scores(wanted, protocol, num_test, scored):
    assert images.num_scored(wanted, protocol, num_test) == scored


def test_more_images_than_there_are_or_fewer_than_the_protocol_needs_are_refused():
    with pytest.raises(ValueError, match="eval.num_images=300 exceeds the 299"):
        images.num_scored(300, "exact", 299)
    with pytest.raises(ValueError, match=r"eval.protocol='ho2020' scores multiples of 256 images, not 20 \("):
        images.num_scored(20, "ho2020", 299)
    with pytest.raises(ValueError, match=r"not 200 \(eval.num_images=0, 200 test images\)"):
        images.num_scored(0, "ho2020", 200)


def test_an_empty_test_split_is_named():
    """As of a set of less than twenty training examples, of which each twentieth is for testing."""
    for wanted in (0, 20):
        with pytest.raises(ValueError, match=f"^eval.num_images={wanted}: the test split has no images; -1 trains"):
            images.num_scored(wanted, "exact", 0)
    assert images.num_scored(-1, "exact", 0) == 0


def test_a_subset_is_drawn_from_all_images():
    chosen = images.subset(1000, 100)
    assert len(np.unique(chosen)) == 100 and np.all(np.diff(chosen) > 0)
    assert np.bincount(chosen // 100, minlength=10).min() > 0  # every tenth of a set that is sorted by class
    np.testing.assert_array_equal(images.subset(1000, 100), chosen)
    np.testing.assert_array_equal(images.subset(1000, 1000), np.arange(1000))
