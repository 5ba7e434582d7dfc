"""`decoder_share` with batches of 16, which are almost twice as many steps.

    python -m experiments.records --records=share_with_batch_16 --minutes=8 --workdir=runs/records

From     decoder_share
Idea     more steps of noisier gradients
"""

from ml_collections import ConfigDict

from configs.records import decoder_share


def get_config() -> ConfigDict:
    """What differs from `decoder_share`."""
    config = decoder_share.get_config()
    config.train.batch_size = 16
    return config
