"""Sampling from a checkpoint: the run's own images again, or others by another method and with fewer steps."""

import shutil

import numpy as np
import pytest
from PIL import Image

from diffusion.programs import sample


def saved_images(directory):
    return np.load(directory / "samples.npz")["images"]


def test_the_samples_of_a_checkpoint_are_those_of_the_run(straight, tiny, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    sample.run(tiny(sample__batch_size=5), tmp_path / "run")
    again, before = saved_images(tmp_path / "run"), saved_images(straight)
    # A pixel value may round the other way where the batch size changed the order of sums.
    assert np.mean(again != before) < 0.01 and np.abs(again.astype(int) - before).max() <= 1


def test_another_method_with_fewer_steps_and_images(straight, tiny, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    config = tiny(sample__method="ddim(eta=0.5)", sample__num_steps=3, sample__num_images=2)
    sample.run(config, tmp_path / "run")
    few = saved_images(tmp_path / "run")
    assert few.shape == (2, 8, 8, 1) and few.dtype == np.uint8 and few.max() <= 16
    sample.run(config, tmp_path / "run")
    np.testing.assert_array_equal(saved_images(tmp_path / "run"), few)
    # A row of pictures for each image, a column for each of the three steps; 48 pixels and a margin of 2 each.
    assert Image.open(tmp_path / "run" / "progressive.png").size == (3 * 50 + 2, 2 * 50 + 2)


def test_without_a_checkpoint_there_is_nothing_to_sample_from(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        sample.run(tiny(), tmp_path)
