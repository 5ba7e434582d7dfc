"""Ho et al.'s L_simple with the variance β̃.

    python -m experiments.records --records=simple_fixed_small --minutes=8 --workdir=runs/records

From     simple_fixed_large
Idea     the smaller of the two fixed variances; L_simple trains no variance, so the weights are the same
Weights  simple_fixed_large
"""

from ml_collections import ConfigDict

from configs.records import simple_fixed_large


def get_config() -> ConfigDict:
    """What differs from `simple_fixed_large`."""
    config = simple_fixed_large.get_config()
    config.model.variance = "fixed_small"
    return config
