"""The demo: scikit-learn's 8×8 handwritten digits, from random weights to samples and bits/dim on a 2-core CPU.

    python main.py --config=configs/digits.py --workdir=runs/digits

Data     scikit-learn's, prepared on first use
Cost     703,463 parameters; 2,400 steps of 32 images
Paper    none: a recipe of this project
"""

from ml_collections import ConfigDict

from configs import digits_adam


def get_config() -> ConfigDict:
    """What differs from the demo's earlier recipe."""
    config = digits_adam.get_config()
    config.schedule.num_steps = 100
    config.objective.timesteps = "low_discrepancy(at_1=0.125)"
    config.optim.name = "muon"
    config.optim.learning_rate = 8e-3
    config.train.num_steps = 2400
    return config
