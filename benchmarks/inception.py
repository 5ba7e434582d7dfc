"""Inception's features for FID: images per second, beside torch-fidelity's module with the same random weights.

    python -m benchmarks.inception                              # 64 images of 32×32 in a timed call
    python -m benchmarks.inception --num-images=10000 --rounds=1 --no-compile

Both sides take uint8 images and return all five kinds of features. The PyTorch arms are torch-fidelity's module,
unchanged, with channels_last, and compiled by torch.compile, in batches of 64. They must agree to 1e-4 before they are
timed. On a GPU both sides multiply in float32. The arm with TF32, PyTorch's default, changes the features.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from benchmarks import networks, sides, timing
from benchmarks.timing import Arm, Arms
from diffusion.networks import inception
from diffusion.networks.inception_weights import layout
from experiments.commands import exit_with

try:
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
except ImportError:  # the peers are optional: pip install -e '.[peers]'
    torch = None

MANY = 10_000


def main() -> None:
    parser = sides.arguments(__doc__, "inception")
    parser.add_argument("--num-images", type=timing.count, default=64, help="images in a timed call")
    parser.add_argument("--image-size", type=timing.count, default=32)
    parser.add_argument("--batch-size", type=timing.count, default=64, help="PyTorch's, and ours on an accelerator")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes minutes")
    args = parser.parse_args()

    costs, _ = sides.measured(args, our_arms, peer_arms if networks.has_peer(torch) else None)

    def columns(_: str, seconds: np.ndarray) -> dict[str, Any]:
        minutes = timing.quartiles(MANY / args.num_images * seconds / 60)
        return {"images/s": timing.quartiles(args.num_images / seconds), f"{MANY:,} images, minutes": minutes}

    seconds = {name: cost.seconds for name, cost in costs.items()}
    theirs = [name for name in costs if name != "ours" and "TF32" not in name]
    ratio = {"seconds": timing.best_ratio(seconds, ["ours"], theirs)} if theirs else {}
    timing.finish(args.out, vars(args), timing.rows(costs, columns), **ratio)


def our_arms(args) -> Arms:
    images = random_images(args.num_images, args.image_size)
    batch_size = 8 if jax.default_backend() == "cpu" else args.batch_size
    return {"ours": Arm(partial(inception.features, our_params(random_tensors(seed=0)), images, batch_size))}


def our_params(tensors: dict[str, np.ndarray]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, f"{folder}/inception.safetensors")
        return inception.load(f"{folder}/inception.safetensors", check_digest=False)


def random_images(count: int, height: int, width: int | None = None) -> np.ndarray:
    """Random images, equal on every machine and with every version of NumPy, because `RandomState` is frozen."""
    shape = (count, height, width or height, 3)
    return np.random.RandomState(height).randint(0, 256, shape, np.uint8)


def random_tensors(seed: int) -> dict[str, np.ndarray]:
    """Reproducible weights by their published names, with which every part of the network affects the output.

    He et al.'s variance preserves the scale of the maps. About half of the numbers are negative before each ReLU.
    Small variances in the batch norms make their ε matter.
    """
    random = np.random.RandomState(seed)
    ranges = {"running_mean": (-0.2, 0.2), "running_var": (0.2, 2.0), "bn.weight": (0.4, 1.3), "bias": (-0.3, 0.3)}
    tensors = {}
    for name, shape in layout().items():
        limit = (6 / np.prod(shape[1:])) ** 0.5
        low, high = next((ends for part, ends in ranges.items() if part in name), (-limit, limit))
        tensors[name] = (low + (high - low) * random.random_sample(shape)).astype(np.float32)
    return tensors


def torch_fidelity(tensors: dict[str, np.ndarray], dtype: str = "float32") -> Any:
    """torch-fidelity's module with these weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inception.pth"
        torch.save({name: torch.tensor(tensor) for name, tensor in tensors.items()}, path)
        return FeatureExtractorInceptionV3(
            "inception",
            list(inception.DIMENSIONS),
            feature_extractor_weights_path=str(path),
            feature_extractor_internal_dtype=dtype,
        )


def peer_features(module: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    """The module's features of images [n, h, w, 3]."""
    with torch.no_grad():
        found = module(torch.tensor(images.transpose(0, 3, 1, 2).copy(), device=networks.device()))
    return {name: values.cpu().numpy() for name, values in zip(inception.DIMENSIONS, found, strict=True)}


def refuse_difference(params: Any, module: Any, images: np.ndarray) -> None:
    """Raises a RuntimeError if features differ by more than 1e-4 of their norm."""
    found, wanted = inception.features(params, images), peer_features(module, images)
    for name in inception.DIMENSIONS:
        error = np.linalg.norm(found[name] - wanted[name]) / np.linalg.norm(wanted[name])
        if not error < 1e-4:
            raise RuntimeError(f"the weights are the same, but the features {name} differ by {error:.2g}")


def peer_arms(args) -> Arms:
    images, tensors = random_images(args.num_images, args.image_size), random_tensors(seed=0)
    module = torch_fidelity(tensors).to(networks.device())
    networks.multiply_as_tf32(False)
    refuse_difference(our_params(tensors), module, images[:2])

    def arm(module: Any, tf32: bool = False) -> Arm:
        def call() -> None:
            networks.multiply_as_tf32(tf32)
            for i in range(0, len(images), args.batch_size):
                peer_features(module, images[i : i + args.batch_size])

        return Arm(call)

    channels_last = torch_fidelity(tensors).to(networks.device(), memory_format=torch.channels_last)
    arms = {"torch-fidelity": arm(module), "torch-fidelity, channels_last": arm(channels_last)}
    if networks.device() == "cuda":
        arms["torch-fidelity, channels_last, TF32"] = arm(channels_last, tf32=True)
    if not args.no_compile:
        arms["torch-fidelity, channels_last, compiled"] = arm(torch.compile(channels_last))
    return arms


if __name__ == "__main__":
    exit_with(main)
