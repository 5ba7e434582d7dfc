"""Makes sample_metrics.npz: torch-fidelity's metrics of random features, in float64.

    python tests/golden/sample_metrics.py       # with the extra peers

The features come from NumPy's frozen generator, so only the numbers are kept.
"""

from pathlib import Path

import numpy as np

KID = {"kid_subsets": 20, "kid_subset_size": 50, "rng_seed": 2020, "verbose": False}
SPLITS = 10
NEIGHBOURS = (1, 3)
DIMENSIONS = (3, 16)


def features(dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """Those of 203 generated and 310 real images."""
    rng = np.random.RandomState(dimension)
    return rng.standard_normal((203, dimension)) * 1.2 + 0.2, rng.standard_normal((310, dimension))


def numbers(generated: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """torch-fidelity's, by name."""
    import torch
    from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    sides = torch.tensor(generated), torch.tensor(real)
    kid = metric_kid.kid_features_to_metric(*sides, **KID)
    isc = metric_isc.isc_features_to_metric(sides[0], SPLITS, shuffle=False)
    shuffled = metric_isc.isc_features_to_metric(sides[0], SPLITS, shuffle=True, rng_seed=2020)
    fid = metric_fid.fid_statistics_to_metric(*map(metric_fid.fid_features_to_statistics, sides), verbose=False)
    found = {
        "fid": fid["frechet_inception_distance"],
        "kid": kid["kernel_inception_distance_mean"],
        "kid_std": kid["kernel_inception_distance_std"],
        "inception_score": isc["inception_score_mean"],
        "inception_score_std": isc["inception_score_std"],
        "shuffled_inception_score": shuffled["inception_score_mean"],
        "shuffled_inception_score_std": shuffled["inception_score_std"],
    }
    for k in NEIGHBOURS:
        given = {"prc_neighborhood": k, "prc_batch_size": 10_000, "save_cpu_ram": False, "verbose": False}
        prc = metric_prc.prc_features_to_metric(*sides, **given)
        found |= {f"precision_{k}": prc["precision"], f"recall_{k}": prc["recall"]}
    return found


if __name__ == "__main__":
    arrays = {f"{d}/{name}": value for d in DIMENSIONS for name, value in numbers(*features(d)).items()}
    np.savez_compressed(Path(__file__).with_name("sample_metrics.npz"), **arrays)
