"""`decoder_share` with batches of 8, which are four times as many steps.

    python -m experiments.records --records=share_with_batch_8 --minutes=8 --workdir=runs/records

From     decoder_share
Idea     still more steps of still noisier gradients
"""

from ml_collections import ConfigDict

from configs.records import decoder_share


def get_config() -> ConfigDict:
    """What differs from `decoder_share`."""
    config = decoder_share.get_config()
    config.train.batch_size = 8
    return config
