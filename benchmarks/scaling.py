"""How step time, memory and checkpoints grow with batch, image size, width and devices: on paper.

    python -m benchmarks.scaling

Nothing is run or compiled. FLOPs are XLA's count for the traced program. Memory is exact for the arrays that a step
must hold (parameters, EMA, Adam, gradients) and for those that JAX keeps for the backward pass before XLA fuses, which
are more than XLA keeps. The traffic is that of these arrays: kept arrays are written once and read once, and the state
is read and written once. The roofline's time is the larger of FLOPs over the device's peak and this traffic over its
memory bandwidth, as if nothing else took time. Communication between devices is not included.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import networks, timing
from diffusion.experiment import build, memory
from diffusion.programs import describe
from experiments.commands import exit_with


class Device(NamedTuple):
    """An accelerator by its data sheet: dense bfloat16 FLOP/s, and bytes/s of its memory."""

    name: str
    flops: float
    bandwidth: float


DEVICES = (Device("H200", 990e12, 4.8e12), Device("TPU v4", 275e12, 1.2e12))
# The rows, in groups that grow along one axis: (axis, image size, channels, batch, devices, remat).
CASES = [
    *(("batch", 32, 128, batch, 1, False) for batch in (8, 32, 128, 512)),
    *(("image size", size, 128, 16, 1, False) for size in (32, 64, 128, 256)),
    *(("width", 32, channels, 128, 1, False) for channels in (32, 64, 128, 256)),
    *(("devices", 32, 128, 128, devices, False) for devices in (1, 2, 4, 8)),
    *(("remat", 32, 128, 128, 1, remat) for remat in (False, True)),
]


def main() -> None:
    args = timing.arguments(__doc__, "scaling").parse_args()
    timing.finish(args.out, vars(args), [row(*case) for case in CASES])


def row(axis: str, size: int, channels: int, batch: int, devices: int, remat: bool) -> dict[str, Any]:
    """The figures of one network on `devices` devices, which share the batch."""
    config = networks.config_of("full", channels=channels, dtype="bfloat16", remat=remat)
    # Halved down to 4 × 4 for every image size.
    config.unet.channel_mult = (1, *(2,) * (int(np.log2(size)) - 2))
    experiment = build.experiment(config, (size, size, 3), 256)
    state, local = experiment.abstract_state(), batch // devices
    flops = 3 * local * describe.forward_flops(experiment) * (4 / 3 if remat else 1)
    kept = memory.residual_bytes(experiment, local)
    held = memory.state_bytes(experiment)
    moved = 2 * kept + 2 * memory.num_bytes(state)
    figures = {
        "axis": axis,
        "images": f"{size}×{size}",
        "channels": channels,
        "batch": batch,
        "devices": devices,
        "remat": "yes" if remat else "no",
        "parameters, million": sum(leaf.size for leaf in jax.tree.leaves(state.params)) / 1e6,
        "checkpoint, GiB": memory.num_bytes(state) / 2**30,
        "TFLOP per step and device": flops / 1e12,
        "memory, GiB, at most": (held + kept) / 2**30,
    }
    for device in DEVICES:
        compute, traffic = flops / device.flops, moved / device.bandwidth
        bound = "compute" if compute > traffic else "memory"
        figures[f"{device.name}, ms"] = f"{1e3 * max(compute, traffic):.3g} ({bound})"
    return figures


if __name__ == "__main__":
    exit_with(main)
