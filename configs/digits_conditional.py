"""The demo with labels: digits that are drawn by their number, with classifier-free guidance.

python main.py --config=configs/digits_conditional.py --workdir=runs/digits_conditional

Data     scikit-learn's, prepared on first use
Cost     as the demo
Expect
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    """What differs from the demo."""
    config = digits.get_config()
    config.model.conditional = True
    config.model.label_dropout = 0.1
    config.sample.num_images = 100
    config.sample.num_previews = 100
    return config
