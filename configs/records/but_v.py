"""All four changes except the prediction of v.

    python -m experiments.records --records=but_v --minutes=8 --workdir=runs/records

From     all_four
Idea     the effect of v beside the others
"""

from ml_collections import ConfigDict

from configs.records import all_four


def get_config() -> ConfigDict:
    """What differs from `all_four`."""
    config = all_four.get_config()
    config.model.prediction = "eps"
    return config
