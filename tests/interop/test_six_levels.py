"""The layout of Ho et al.'s network for 256×256: six levels, attention at the fifth.

`unet_six_levels.npz` was printed by diffusers 0.42.1 with PyTorch 2.14.1 on a CPU, for widths a sixteenth of the
published ones and one residual block per level instead of two: the names and shapes of its tensors, and every eighth
pixel of its float64 output for `weights` and `inputs`.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from configs import celebahq256
from diffusion import interop
from diffusion.experiment import build

CONFIG = Path(__file__).parents[1] / "golden" / "unet_six_levels.json"
GOLDEN = CONFIG.with_suffix(".npz")
# Of the norm: float32 rounds by 1.2e-7 in each of the layers that an image goes through, of which there are 32 blocks.
# Measured: 4e-7 for the narrow network, 1.6e-6 for the full one, for which diffusers' own float32 output has 5.5e-6.
TOLERANCE = 5e-6


def weights(shapes):
    """Tensors of these shapes by name, from a generator that NumPy keeps as it is; norms differ from 1 and 0, too."""
    tensors, rng = {}, np.random.RandomState(0)
    for name in sorted(shapes):
        shape = shapes[name]
        size = np.sqrt(3 / np.prod(shape[1:])) if len(shape) > 1 else 0.5
        mean = 1.0 if name.endswith("weight") and len(shape) == 1 else 0.0
        tensors[name] = (mean + size * rng.uniform(-1, 1, shape)).astype(np.float32)
    return tensors


def inputs(size):
    """An image and what the network is conditioned on."""
    x = np.random.RandomState(1).uniform(-1, 1, (1, size, size, 3)).astype(np.float32)
    return x, np.array([700], np.int32)


def output(unet, params, size):
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(unet.apply)({"params": params}, *inputs(size)))


def relative_error(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def test_six_levels_give_their_published_output(tmp_path):
    golden = np.load(GOLDEN)
    shapes = {name: tuple(filter(None, shape)) for name, shape in zip(golden["names"], golden["shapes"], strict=True)}
    shutil.copyfile(CONFIG, tmp_path / "config.json")
    save_file(weights(shapes), tmp_path / "diffusion_pytorch_model.safetensors")
    unet, params = interop.load_diffusers(tmp_path)
    assert relative_error(output(unet, params, 64)[:, ::8, ::8], golden["y"]) < TOLERANCE


FULL = {
    "sample_size": 256,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
}


@pytest.mark.parametrize("changes", [{}, pytest.param(FULL, marks=pytest.mark.slow)], ids=["narrow", "full"])
def test_diffusers_reads_and_writes_the_same_network(changes, tmp_path):
    diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
    config = json.loads(CONFIG.read_text()) | changes
    size = config["sample_size"]
    theirs = diffusers.UNet2DModel.from_config(config)
    tensors = weights({name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()})
    theirs.load_state_dict({name: torch.tensor(tensor) for name, tensor in tensors.items()})
    theirs.save_pretrained(tmp_path / "theirs")
    x, network_t = inputs(size)
    with torch.no_grad():
        x = torch.tensor(x, dtype=torch.float64).permute(0, 3, 1, 2)
        y = theirs.double().eval()(x, torch.tensor(network_t)).sample.permute(0, 2, 3, 1).numpy()
    if changes:
        assert sum(tensor.size for tensor in tensors.values()) == 113_673_219
    else:
        assert relative_error(y[:, ::8, ::8], np.load(GOLDEN)["y"]) < TOLERANCE

    unet, params = interop.load_diffusers(tmp_path / "theirs")
    assert relative_error(output(unet, params, size), y) < TOLERANCE
    if changes:
        experiment = build.experiment(celebahq256.get_config(), (256, 256, 3), 256)
        assert unet == experiment.training.network

    interop.save_diffusers(tmp_path / "ours", unet, params, size)
    ours = diffusers.UNet2DModel.from_pretrained(tmp_path / "ours").state_dict()
    assert ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(ours[name].numpy(), tensor, err_msg=name, strict=True)
