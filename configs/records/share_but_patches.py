"""`decoder_share` without patches: the same arithmetic pays for fewer steps of a network on every pixel.

    python -m experiments.records --records=share_but_patches --minutes=8 --workdir=runs/records

From     decoder_share
Idea     the effect of the patches beside the others
"""

from ml_collections import ConfigDict

from configs.records import decoder_share


def get_config() -> ConfigDict:
    """What differs from `decoder_share`."""
    config = decoder_share.get_config()
    config.unet.patch_size = 1
    config.unet.channel_mult = (1, 2, 2, 2)  # maps of 32, 16, 8 and 4
    return config
