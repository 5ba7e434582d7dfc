"""Four changes at once: v, a learned schedule, low-discrepancy t and Fourier features.

    python -m experiments.records --records=all_four --minutes=8 --workdir=runs/records

From     vlb
Idea     the four changes together
"""

from ml_collections import ConfigDict

from configs.records import vlb


def get_config() -> ConfigDict:
    """What differs from `vlb`."""
    config = vlb.get_config()
    config.model.prediction = "v"
    config.schedule.name = "learned(start='cosine', inner='second_moment')"
    config.objective.timesteps = "low_discrepancy"
    config.unet.fourier_features = (5, 6, 7, 8)
    return config
