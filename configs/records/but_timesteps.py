"""All four changes except low-discrepancy t.

    python -m experiments.records --records=but_timesteps --minutes=8 --workdir=runs/records

From     all_four
Idea     the effect of low-discrepancy t beside the others
"""

from ml_collections import ConfigDict

from configs.records import all_four


def get_config() -> ConfigDict:
    """What differs from `all_four`."""
    config = all_four.get_config()
    config.objective.timesteps = "uniform"
    return config
