"""The bound, and a noise schedule that is learned with the network.

    python -m experiments.records --records=vlb_schedule --minutes=8 --workdir=runs/records

From     vlb
Idea     the schedule with the least variance of the loss
"""

from ml_collections import ConfigDict

from configs.records import vlb


def get_config() -> ConfigDict:
    """What differs from `vlb`."""
    config = vlb.get_config()
    config.schedule.name = "learned(start='cosine', inner='second_moment')"
    return config
