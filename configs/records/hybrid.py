"""Nichol & Dhariwal's L_hybrid at a quarter of Ho et al.'s width: the base of the records.

    python -m experiments.records --records=hybrid --minutes=8 --workdir=runs/records

From     configs/cifar10.py
Idea     none: a learned variance with the linear schedule, as the baseline of a small budget
"""

from ml_collections import ConfigDict

from configs import cifar10


def get_config() -> ConfigDict:
    """A quarter of the width; settings for 800,000 steps are adapted to some hundreds."""
    config = cifar10.get_config()
    config.model.variance = "learned_range"
    config.objective.name = "hybrid"
    config.unet.channels = 32
    config.unet.num_groups = 8  # four channels a group, as in the full network
    config.unet.dropout = 0.0
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 50
    config.optim.decay = "cosine"
    config.ema.decay = 0.99
    config.train.batch_size = 32
    config.train.sample_every = 0
    config.sample.num_images = 16
    config.sample.num_steps = 50
    return config
