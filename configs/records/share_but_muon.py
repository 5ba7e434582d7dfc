"""`decoder_share` with Adam, at the rate of `patch`.

    python -m experiments.records --records=share_but_muon --minutes=8 --workdir=runs/records

From     decoder_share
Idea     the effect of Muon beside the others
"""

from ml_collections import ConfigDict

from configs.records import decoder_share


def get_config() -> ConfigDict:
    """What differs from `decoder_share`."""
    config = decoder_share.get_config()
    config.optim.name = "adam"
    config.optim.learning_rate = 2e-3
    return config
