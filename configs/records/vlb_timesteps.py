"""The bound, with low-discrepancy t.

    python -m experiments.records --records=vlb_timesteps --minutes=8 --workdir=runs/records

From     vlb
Idea     less variance of the loss
"""

from ml_collections import ConfigDict

from configs.records import vlb


def get_config() -> ConfigDict:
    """What differs from `vlb`."""
    config = vlb.get_config()
    config.objective.timesteps = "low_discrepancy"
    return config
