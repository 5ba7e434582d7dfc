"""configs/digits.py with a network of one layer, which compiles quickly, for --config of main.py."""

import sys
from pathlib import Path

from ml_collections import ConfigDict

sys.path.insert(0, str(Path(__file__).parent))

import toy  # noqa: E402

from configs import digits  # noqa: E402


def get_config() -> ConfigDict:
    toy.register()
    config = digits.get_config()
    config.model.network = "layer"
    return config
