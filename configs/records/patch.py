"""Patches of 2×2 pixels: the network's first map is 16×16, and a budget pays for almost four times as many steps.

    python -m experiments.records --records=patch --minutes=8 --workdir=runs/records

From     but_fourier
Idea     patches of 2×2 pixels on three levels, and twice the learning rate
"""

from ml_collections import ConfigDict

from configs.records import but_fourier


def get_config() -> ConfigDict:
    """What differs from `but_fourier`."""
    config = but_fourier.get_config()
    config.unet.patch_size = 2
    config.unet.channel_mult = (1, 2, 2)  # maps of 16, 8 and 4
    config.optim.learning_rate = 2e-3
    return config
