"""The bound, and a network that predicts v.

    python -m experiments.records --records=vlb_v --minutes=8 --workdir=runs/records

From     vlb
Idea     where there is little signal, v is nearly x_0
"""

from ml_collections import ConfigDict

from configs.records import vlb


def get_config() -> ConfigDict:
    """What differs from `vlb`."""
    config = vlb.get_config()
    config.model.prediction = "v"
    return config
