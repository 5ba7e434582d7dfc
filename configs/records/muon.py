"""The four changes of `all_four` with Muon instead of Adam.

    python -m experiments.records --records=muon --minutes=8 --workdir=runs/records

From     all_four
Idea     steps of a kernel that are equally large in every direction
"""

from ml_collections import ConfigDict

from configs.records import all_four


def get_config() -> ConfigDict:
    """What differs from `all_four`."""
    config = all_four.get_config()
    config.optim.name = "muon"
    config.optim.learning_rate = 4e-3
    return config
