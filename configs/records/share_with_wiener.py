"""`share_with_batch_16` with a Wiener filter's estimate of v as three more channels of the input.

    python -m experiments.records --records=share_with_wiener --minutes=8 --workdir=runs/records

From     share_with_batch_16
Idea     the network need not learn how far to average at each noise level
"""

from ml_collections import ConfigDict

from configs.records import share_with_batch_16


def get_config() -> ConfigDict:
    """What differs from `share_with_batch_16`. The filter must know the noise in x_t, so the network is told γ."""
    config = share_with_batch_16.get_config()
    config.model.conditioning = "gamma"
    config.unet.wiener = (3.0, 0.006)
    return config
