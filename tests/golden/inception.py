"""Makes inception.npz: torch-fidelity's features in float64 with random weights, one image per size.

    PYTHONPATH=. python tests/golden/inception.py       # with the extra peers

Weights and images come from NumPy's frozen generator (benchmarks/inception.py), so only the features are kept.
"""

from pathlib import Path

import numpy as np

from benchmarks import inception

SIZES = ((8, 8), (32, 32), (65, 40), (299, 299), (310, 150))

if __name__ == "__main__":
    module = inception.torch_fidelity(inception.random_tensors(seed=0), dtype="float64")
    arrays = {}
    for height, width in SIZES:
        found = inception.peer_features(module, inception.random_images(1, height, width))
        arrays |= {f"{height}x{width}/{name}": values for name, values in found.items()}
    np.savez_compressed(Path(__file__).with_name("inception.npz"), **arrays)
