"""Ho et al.'s L_simple with the variance β.

    python -m experiments.records --records=simple_fixed_large --minutes=8 --workdir=runs/records

From     hybrid
Idea     the same loss without a learned variance
"""

from ml_collections import ConfigDict

from configs.records import hybrid


def get_config() -> ConfigDict:
    """What differs from `hybrid`."""
    config = hybrid.get_config()
    config.objective.name = "simple"
    config.model.variance = "fixed_large"
    return config
