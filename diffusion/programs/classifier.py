"""--mode=classifier: trains the classifier on the data's own labels, for quality.features="classifier"."""

import dataclasses
import json
from pathlib import Path

from ml_collections import ConfigDict

from diffusion.evaluation import classifier
from diffusion.experiment import build
from diffusion.runtime import processes
from diffusion.runtime.preemption import Preemption


def run(config: ConfigDict, _directory: Path) -> None:
    """Trains the classifier from config.seed, keeps it in the cache by the data's digest, and prints its provenance."""

    def train() -> None:
        trained = classifier.train(train_set, test_set, config.seed)
        path = classifier.path_of(trained.provenance.data_sha256)
        classifier.save(trained, path)
        named = {"path": str(path), "sha256": trained.sha256()} | dataclasses.asdict(trained.provenance)
        print(json.dumps(named, indent=2))

    with Preemption() as preemption:
        with preemption.at_points():
            train_set, _, test_set = build.load_splits(config)
        processes.on_first(train)
