"""--mode=classifier: trains the classifier of the data's own labels that quality.features="classifier" takes."""

import dataclasses
import json
from pathlib import Path

from ml_collections import ConfigDict

from diffusion.evaluation import classifier
from diffusion.experiment import build
from diffusion.runtime import processes
from diffusion.runtime.preemption import Preemption


def run(config: ConfigDict, _directory: Path) -> None:
    """Trains it from config.seed and keeps it in the cache, by the digest of the data; prints what is known of it."""
    train_set, _, test_set = build.load_splits(config)

    def train() -> None:
        with Preemption():
            trained = classifier.train(train_set, test_set, config.seed)
        path = classifier.path_of(trained.provenance.data_sha256)
        classifier.save(trained, path)
        named = {"path": str(path), "sha256": trained.sha256()} | dataclasses.asdict(trained.provenance)
        print(json.dumps(named, indent=2))

    processes.on_first(train)
