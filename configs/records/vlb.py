"""The bound itself as the loss.

    python -m experiments.records --records=vlb --minutes=8 --workdir=runs/records

From     hybrid
Idea     train by the quantity that is measured
"""

from ml_collections import ConfigDict

from configs.records import hybrid


def get_config() -> ConfigDict:
    """What differs from `hybrid`."""
    config = hybrid.get_config()
    config.objective.name = "vlb"
    return config
