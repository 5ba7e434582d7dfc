"""`decoder_share` with the decoder by Bayes' rule: L_0 needs no network.

    python -m experiments.records --records=share_with_bayes --minutes=8 --workdir=runs/records

From     decoder_share
Idea     the network is free for the KL terms, and the schedule balances the two
"""

from ml_collections import ConfigDict

from configs.records import decoder_share


def get_config() -> ConfigDict:
    """What differs from `decoder_share`."""
    config = decoder_share.get_config()
    config.model.decoder = "bayes"
    return config
