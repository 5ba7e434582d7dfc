"""Digits with labels: drawn by their number, with classifier-free guidance.

    python main.py --config=configs/digits_conditional.py --workdir=runs/digits_conditional

Data     scikit-learn's, prepared on first use
Cost     704,642 parameters; 1,000 steps of 32 images; the test images scored once more without labels
Expect   1.92 bits/dim on the 299 test images given their labels (data.validation=0), 0.16 more without;
         digits that are what their label says (docs/labels.md)
Paper    none: digits_fixed.py, with 10% of the labels dropped as in Ho & Salimans (2022)
"""

from ml_collections import ConfigDict

from configs import digits_fixed


def get_config() -> ConfigDict:
    """What differs from the same network without labels."""
    config = digits_fixed.get_config()
    config.model.conditional = True
    config.model.label_dropout = 0.1
    config.sample.num_images = 100
    config.sample.num_previews = 100
    return config
