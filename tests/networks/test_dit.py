"""DiT: the original code's numbers and sizes, its initialization, its errors, and its place in a config."""

from functools import cache
from pathlib import Path

import dit_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from configs import digits_fixed
from diffusion.experiment import build
from diffusion.networks import dit as dit_module
from diffusion.networks.dit import DiT
from diffusion.networks.layers import LabelEmbedding, fan_avg

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "dit.npz")
TINY = DiT(hidden_size=8, depth=1, num_heads=2, mlp_ratio=2.0, num_classes=3)
# Our modules -> theirs.
THEIRS = {
    "patches_in": "x_embedder.proj",
    "time_1": "t_embedder.mlp.0",
    "time_2": "t_embedder.mlp.2",
    "modulation_out": "final_layer.adaLN_modulation.1",
    "patches_out": "final_layer.linear",
}
OF_BLOCKS = {  # those in a block
    "modulation": "adaLN_modulation.1",
    "qkv": "attn.qkv",
    "projection": "attn.proj",
    "mlp_1": "mlp.fc1",
    "mlp_2": "mlp.fc2",
}
# Learned parameters of the original DiT-S/2, B/2, L/2 and XL/2 on latents of 32×32×4, counted there. In
# millions they are 33, 130, 458 and 675, the paper's numbers as they are usually cited (its table was not read).
SIZES = [
    ({"hidden_size": 384, "depth": 12, "num_heads": 6}, 32_865_056),
    ({"hidden_size": 768, "depth": 12, "num_heads": 12}, 130_315_808),
    ({"hidden_size": 1024, "depth": 24, "num_heads": 16}, 457_840_672),
    ({"hidden_size": 1152, "depth": 28, "num_heads": 16}, 674_834_720),
]


def params_of_original(depth):
    """The original program's weights as ours."""
    listed = zip(GOLDEN["names"], GOLDEN["shapes"], strict=True)
    theirs = dit_cases.weights({str(name): tuple(filter(None, shape.tolist())) for name, shape in listed})
    names = dict(THEIRS)
    for i in range(depth):
        names |= {f"block_{i}/{ours}": f"blocks.{i}.{name}" for ours, name in OF_BLOCKS.items()}
    ours = {}
    for module, name in names.items():
        kernel = theirs.pop(f"{name}.weight")
        if kernel.ndim == 4:  # a convolution [out, in, h, w] of stride h
            kernel = kernel.transpose(0, 2, 3, 1).reshape(len(kernel), -1)
        ours |= {f"{module}/kernel": kernel.T, f"{module}/bias": theirs.pop(f"{name}.bias")}
    table = theirs.pop("y_embedder.embedding_table.weight")
    assert not theirs
    ours["time_2/bias"] = ours["time_2/bias"] + table[-1]  # the vector of no label
    ours["label/embedding"] = table[:-1] - table[-1]
    return unflatten_dict({tuple(path.split("/")): leaf for path, leaf in ours.items()})


def test_outputs_are_those_of_the_original_program():
    fields = ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "num_classes")
    dit = DiT(**{name: dit_cases.SETTINGS[name] for name in fields}, out_channels=6)
    x, t, labels = dit_cases.inputs()
    labels = np.where(labels == dit.num_classes, -1, labels)
    output = jax.jit(dit.apply)({"params": params_of_original(dit.depth)}, x, t, labels=labels)
    wanted = GOLDEN["outputs"]
    # Most of it is at t = 999, where the last bit of a frequency shows, which PyTorch rounds otherwise.
    assert np.linalg.norm(output - wanted) < 1e-5 * np.linalg.norm(wanted)


@cache
def param_shapes(network, image_shape=(4, 4, 3)):
    params = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *image_shape)), jnp.zeros(1))["params"]
    return {"/".join(path): leaf for path, leaf in flatten_dict(params).items()}


@pytest.mark.parametrize(("fields", "learned"), SIZES)
def test_the_paper_s_networks_have_the_original_number_of_parameters(fields, learned):
    dit = DiT(**fields, num_classes=1000, out_channels=8)
    shapes = param_shapes(dit.copy(depth=1), (32, 32, 4))  # all blocks are alike
    sizes = {path: leaf.size for path, leaf in shapes.items()}
    of_a_block = sum(size for path, size in sizes.items() if path.startswith("block_0/"))
    # There a row of the table stands for no label.
    assert sum(sizes.values()) + (dit.depth - 1) * of_a_block == learned - dit.hidden_size


def test_the_default_is_the_paper_s_smallest_network():
    assert DiT() == DiT(patch_size=2, mlp_ratio=4.0, **SIZES[0][0])


def test_weights_start_as_in_the_original_program():
    found = {}

    def note(call, args, kwargs, context):
        if isinstance(context.module, nn.Dense):
            found["/".join(context.module.path)] = context.module.kernel_init
        if isinstance(context.module, LabelEmbedding):
            found["label"] = context.module.initial_std
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(TINY.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)), jnp.zeros(1))
    assert found.pop("label") == dit_module.EMBEDDING_STD == 0.02
    assert found.pop("time_1") is found.pop("time_2") is dit_module.of_embeddings
    for name, init in found.items():  # with those at zero the output is zero and every block the identity
        is_zero = name.split("/")[-1] in ("modulation", "modulation_out", "patches_out")
        assert init is (nn.initializers.zeros if is_zero else fan_avg), name


def test_a_map_need_not_be_square_and_the_column_comes_first():
    found = dit_module.position_embedding(2, 3, 8)
    row, column, frequencies = 1, 2, np.array([1, 0.01])
    place = np.concatenate([f(at * frequencies) for at in (column, row) for f in (np.sin, np.cos)])
    np.testing.assert_allclose(found[row * 3 + column], place, rtol=1e-6)


def test_a_norm_adds_1e_6_to_the_variance_and_takes_scale_and_shift():
    h = jnp.asarray([[[5.001, 4.999]]])  # a variance of 1e-6
    found = dit_module.modulated_norm(h, jnp.asarray([[3.0, 4.0]]), jnp.asarray([[0.5, 1.0]]))
    np.testing.assert_allclose(found[0, 0], [3 + 1.5 / np.sqrt(2), 4 - 2 / np.sqrt(2)], rtol=2e-3)


def test_patches_are_squares_row_by_row_and_go_back():
    x = jnp.asarray(np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3))
    found = dit_module.patches(x, 2)
    np.testing.assert_array_equal(found[1, 4], np.asarray(x)[1, 2:4, 2:4].ravel())  # of 2 rows of 3 patches
    np.testing.assert_array_equal(dit_module.image_of(found, 2, 4, 6), x)


def test_bfloat16_and_remat_keep_the_parameters_and_an_output_in_float32():
    params = unflatten_dict({tuple(path.split("/")): leaf for path, leaf in param_shapes(TINY).items()})
    of_shapes = jax.make_jaxpr(TINY.copy(dtype="bfloat16", remat=True).apply)
    made = of_shapes({"params": params}, jnp.zeros((1, 4, 4, 3)), jnp.zeros(1), None, jnp.zeros(1, int))
    assert made.out_avals[0].str_short() == "float32[1,4,4,6]"
    assert "remat" in str(made) and "bf16[1,4,8]" in str(made)  # the tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "dit.patch_size=3 must be at least 1 and divide height and width, 8×6"),
        ({"patch_size": 4}, "dit.patch_size=4 must"),
        ({"patch_size": 0}, "dit.patch_size=0 must"),
        ({"hidden_size": 6}, "dit.hidden_size=6 must be a multiple of 4"),
        ({"hidden_size": 0}, "dit.hidden_size=0 must"),
        ({"depth": 0}, "dit.depth=0 must be in 1"),
        ({"num_heads": 3}, "dit.num_heads=3 must divide dit.hidden_size=8"),
        ({"num_heads": 0}, "dit.num_heads=0 must"),
        ({"mlp_ratio": 0.1}, "dit.mlp_ratio=0.1 must make a width in 1"),
        ({"mlp_ratio": float("inf")}, "dit.mlp_ratio=inf must"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_config_key(changes, message):
    TINY.check((8, 6, 3))
    with pytest.raises(ValueError, match=message):
        TINY.copy(**changes).check((8, 6, 3))


def test_a_config_chooses_it_with_labels_and_a_learned_variance():
    config = digits_fixed.get_config()
    config.model.network = "dit(hidden_size=8, depth=1, num_heads=2)"
    config.model.conditional = True
    training = build.experiment(config, (8, 8, 1), 17, num_classes=10, on_cpu=True).training
    assert training.network == DiT(hidden_size=8, depth=1, num_heads=2, num_classes=10, out_channels=2)
