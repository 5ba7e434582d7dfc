"""A short training on real pictures: its loss curve, its speed inside the train loop, samples and a bound.

    python -m benchmarks.training --data-dir=DIR                               # CIFAR-10, on a GPU
    python -m benchmarks.training --config=digits_fixed --num-steps=20         # the bundled digits, on a CPU

DIR holds CIFAR-10 as configs/cifar10.py says. The same command resumes a training that was stopped. The pictures and
report.html are in --workdir.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from benchmarks import timing
from diffusion.experiment import workdir
from diffusion.programs import train
from diffusion.reporting.metrics_log import read_metrics
from experiments.commands import exit_with


def main() -> None:
    parser = timing.arguments(__doc__, "training")
    parser.add_argument("--config", choices=["cifar10", "digits_fixed"], default="cifar10")
    parser.add_argument("--data-dir", default="", help="directory of CIFAR-10")
    parser.add_argument("--workdir", type=Path, default=Path("runs/benchmarks/training"))
    parser.add_argument("--num-steps", type=timing.count, default=8000)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    if args.config == "cifar10" and not args.data_dir:
        parser.error("--data-dir=DIR is needed, the directory of CIFAR-10")
    train.run(short(args), args.workdir)
    rows = curve(args.workdir)
    speed = timing.quartiles(np.array([row["images/s"] for row in rows if row["images/s"] is not None]))
    scores = json.loads((args.workdir / workdir.SUMMARY).read_text())
    found = {"images/s": speed, "test, bits/dim": scores["test_bpd"], "its standard error": scores["test_bpd_stderr"]}
    timing.finish(args.out, vars(args) | {"workdir": str(args.workdir)}, rows, **found)


def short(args) -> ConfigDict:
    """The config with a warm-up and an EMA for few steps, scored on a part of the test set."""
    config = importlib.import_module(f"configs.{args.config}").get_config()
    config.data.data_dir = args.data_dir
    config.unet.dtype = args.dtype
    config.optim.warmup_steps = args.num_steps // 10
    config.ema.decay = 0.999
    config.train.num_steps = args.num_steps
    config.train.log_every = max(1, args.num_steps // 20)
    config.train.checkpoint_every = max(1, args.num_steps // 4)
    config.train.sample_every = 0
    config.eval.num_images = 256
    config.eval.terms_per_image = 9
    return config


def curve(directory: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl with a mean loss. A row whose steps include compilation has no speed."""
    return [
        {"step": row["step"], "loss": row["loss"], "images/s": row.get("images_per_second")}
        for row in read_metrics(directory)
        if "loss" in row
    ]


if __name__ == "__main__":
    exit_with(main)
