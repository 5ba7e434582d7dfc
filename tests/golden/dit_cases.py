"""Makes dit.npz: the outputs of facebookresearch/DiT for a small network, by PyTorch on a CPU in float32.

    PYTHONPATH=DIRECTORY_OF_DIT python tests/golden/dit_cases.py

It needs the package timm (made with 1.0.31), whose patch embedding, attention and MLP that code uses. Weights and
inputs come from NumPy's frozen generator, so only the outputs and the names and shapes of the tensors are kept.
"""

from pathlib import Path

import numpy as np

SETTINGS = {"input_size": 8, "in_channels": 3, "patch_size": 2, "hidden_size": 24, "depth": 2, "num_heads": 4}
SETTINGS |= {"mlp_ratio": 2.5, "num_classes": 5, "learn_sigma": True, "class_dropout_prob": 0.1}
POSITIONS = "pos_embed"  # not learned: it stays as the program makes it


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Tensors by name, of ordinary size everywhere: at the start of training half of the network is off."""
    rng, tensors = np.random.RandomState(0), {}
    for name in sorted(shapes.keys() - {POSITIONS}):
        size = np.sqrt(3 / np.prod(shapes[name][1:])) if len(shapes[name]) > 1 else 0.5
        tensors[name] = (size * rng.uniform(-1, 1, shapes[name])).astype(np.float32)
    return tensors


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noisy images, what each is conditioned on, and labels, of which the last stands for none."""
    x = np.random.RandomState(1).standard_normal((4, 8, 8, 3)).astype(np.float32)
    return x, np.array([0, 1, 500, 999]), np.array([0, 3, 4, SETTINGS["num_classes"]])


def results() -> dict[str, np.ndarray]:
    """Names, shapes and outputs of the original program."""
    import torch
    from models import DiT

    network = DiT(**SETTINGS).eval()
    state = network.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    network.load_state_dict(state | {name: torch.tensor(tensor) for name, tensor in weights(shapes).items()})
    x, t, labels = inputs()
    with torch.no_grad():
        outputs = network(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t), torch.tensor(labels))
    return {
        "names": np.array(list(shapes)),
        "shapes": np.array([shape + (0,) * (4 - len(shape)) for shape in shapes.values()], np.int16),
        "outputs": outputs.numpy().transpose(0, 2, 3, 1),
    }


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("dit.npz"), **results())
