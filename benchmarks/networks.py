"""The networks that are compared: ours, and the same weights in the diffusers package, if it is installed."""

import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from configs import cifar10
from diffusion import interop
from diffusion.networks.unet import UNet

try:
    import torch
except ImportError:  # the peers are optional: pip install -e '.[peers]'
    torch = None
try:
    import diffusers
except ImportError:
    diffusers = None

# Ho et al.'s network (35.7M parameters), one a sixteenth as large, and one to try a benchmark with.
SIZES = {
    "full": {"channels": 128, "num_groups": 32},
    "small": {"channels": 32, "num_groups": 8},
    "tiny": {
        "channels": 8, "channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": (), "num_groups": 4,
    },
}  # fmt: skip
IMAGE_SHAPE = (32, 32, 3)


def config_of(size: str, **unet: Any) -> ConfigDict:
    """configs/cifar10.py with a network of SIZES."""
    config = cifar10.get_config()
    config.unet.update(SIZES[size] | unet)
    return config


def device() -> str:
    """PyTorch's device, of the same kind as JAX's."""
    return "cpu" if jax.default_backend() == "cpu" else "cuda"


def peer(size: str, dropout: float = 0.0) -> tuple[PyTree, Any]:
    """Our parameters and the diffusers module with the same weights, PyTorch's random ones, which affect the output.

    After this call PyTorch may multiply float32 as TF32, which JAX does by default on a GPU.

    Raises:
        RuntimeError: for the same noisy images the two outputs differ by more than 1e-4 of their norm.
    """
    ours = UNet(**SIZES[size])
    image = jnp.zeros((1, *IMAGE_SHAPE))
    shapes = jax.eval_shape(ours.init, jax.random.key(0), image, jnp.zeros(1))["params"]
    with tempfile.TemporaryDirectory() as layout, tempfile.TemporaryDirectory() as weights:
        interop.save_diffusers(layout, ours, jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes), 32)
        torch.manual_seed(0)
        diffusers.UNet2DModel.from_config(diffusers.UNet2DModel.load_config(layout)).save_pretrained(weights)
        unet, params = interop.load_diffusers(weights)
        module = diffusers.UNet2DModel.from_pretrained(weights, dropout=dropout).to(device())
    x, t = np.random.default_rng(0).standard_normal((2, *IMAGE_SHAPE), np.float32), np.array([3, 700])
    with jax.default_matmul_precision("highest"):
        found = np.asarray(jax.jit(unet.apply)({"params": params}, x, t))
    multiply_as_tf32(False)
    with torch.no_grad():
        wanted = as_images(module.eval()(from_images(x), torch.tensor(t, device=device())).sample)
    multiply_as_tf32(True)
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    if not error < 1e-4:
        raise RuntimeError(f"the two networks hold the same weights, but their outputs differ by {error:.2g}")
    return params, module


def has_peer(package: Any) -> bool:
    """Whether a peer's package is installed, and PyTorch finds a device of JAX's kind."""
    if package is None:
        return False
    if device() == "cuda" and not torch.cuda.is_available():
        print("PyTorch finds no GPU: only ours is timed")
        return False
    return True


def multiply_as_tf32(allowed: bool) -> None:
    """Sets whether PyTorch may round float32 to TF32 on a GPU. Its default: in convolutions, not in matrix products."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def from_images(x: np.ndarray) -> Any:
    """[B, H, W, C] as PyTorch's [B, C, H, W]."""
    return torch.tensor(np.ascontiguousarray(x.transpose(0, 3, 1, 2)), device=device())


def as_images(x: Any) -> np.ndarray:
    return x.float().cpu().numpy().transpose(0, 2, 3, 1)


def synchronized(call: Callable[[], Any]) -> Callable[[], None]:
    """A PyTorch call that returns when the device has finished."""

    def run() -> None:
        call()
        if device() == "cuda":
            torch.cuda.synchronize()

    return run
