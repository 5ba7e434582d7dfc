"""The patched network with Muon in place of Adam.

    python -m experiments.records --records=patch_muon --minutes=8 --workdir=runs/records

From     patch
Idea     Muon: steps of a kernel that are equally large in every direction
"""

from ml_collections import ConfigDict

from configs.records import patch


def get_config() -> ConfigDict:
    """What differs from `patch`."""
    config = patch.get_config()
    config.optim.name = "muon"
    config.optim.learning_rate = 8e-3
    return config
