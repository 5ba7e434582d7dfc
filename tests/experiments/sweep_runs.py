"""Folders of finished runs, as a sweep leaves them, for the tests of its report."""

import json

import numpy as np

from diffusion.experiment import config as config_lib
from experiments import results

BASE = "configs/digits_fixed.py"

AXES = {
    "prediction": ["eps"], "objective": ["vlb"], "variance": ["fixed_small", "fixed_large"], "schedule": ["cosine"],
    "T": ["4"], "seed": ["0", "1"],
}  # fmt: skip

FIRST = "eps-vlb-fixed_small-cosine-T4-seed0"


def write_run(directory, name, image_bpd, config, **summary):
    """The folder of a finished run with these bounds, as train.run leaves it."""
    folder = directory / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config_lib.to_json(config))
    terms = image_bpd.mean() * np.array([0.5, 0.3, 0.15, 0.05])
    np.savez(folder / "bpd.npz", test_image_bpd=image_bpd, test_terms_bpd=terms)
    numbers = {
        "test_bpd": image_bpd.mean(), "test_decoder_bpd": terms[0], "test_kl_bpd": terms[1:].sum(), "prior_bpd": 1e-5,
        "train_bpd": image_bpd.mean() - 0.1, "test_images": len(image_bpd),
        "device": "cpu ×1", "versions": {"jax": "0"}, "ema_sha256": name,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(numbers | summary))


def table_and_base(directory, name):
    """The rows, and that of the run of this name."""
    table, _ = results.rows(results.read(directory)[0])
    return table, next(row for row in table for run in row.runs if run.name == name)


def columns(directory):
    """The cells of the first table of table.md, by column."""
    head, _, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (directory / "table.md").read_text().partition("\n## ")[0].splitlines()
        if line.startswith("|")
    ]
    return dict(zip(head, zip(*lines, strict=True), strict=True))
