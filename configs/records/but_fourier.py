"""All four changes except the Fourier features.

    python -m experiments.records --records=but_fourier --minutes=8 --workdir=runs/records

From     all_four
Idea     the effect of the features beside the others
"""

from ml_collections import ConfigDict

from configs.records import all_four


def get_config() -> ConfigDict:
    """What differs from `all_four`."""
    config = all_four.get_config()
    config.unet.fourier_features = ()
    return config
