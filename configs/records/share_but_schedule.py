"""`decoder_share` with the linear schedule in place of a learned one.

    python -m experiments.records --records=share_but_schedule --minutes=8 --workdir=runs/records

From     decoder_share
Idea     the effect of the learned schedule beside the others
"""

from ml_collections import ConfigDict

from configs.records import decoder_share


def get_config() -> ConfigDict:
    """What differs from `decoder_share`."""
    config = decoder_share.get_config()
    config.schedule.name = "linear"
    return config
