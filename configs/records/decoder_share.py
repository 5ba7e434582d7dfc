"""Muon on patches, with an eighth of every batch at t = 1.

    python -m experiments.records --records=decoder_share --minutes=8 --workdir=runs/records

From     patch_muon
Idea     the decoder's term, 40% of the bound, is in every gradient and not in 3% of them
"""

from ml_collections import ConfigDict

from configs.records import patch_muon


def get_config() -> ConfigDict:
    """What differs from `patch_muon`."""
    config = patch_muon.get_config()
    config.objective.timesteps = "low_discrepancy(at_1=0.125)"
    return config
