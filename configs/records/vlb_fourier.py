"""The bound, and Fourier features of the input.

    python -m experiments.records --records=vlb_fourier --minutes=8 --workdir=runs/records

From     vlb
Idea     distinguish neighbouring pixel values
"""

from ml_collections import ConfigDict

from configs.records import vlb


def get_config() -> ConfigDict:
    """What differs from `vlb`."""
    config = vlb.get_config()
    config.unet.fourier_features = (5, 6, 7, 8)
    return config
