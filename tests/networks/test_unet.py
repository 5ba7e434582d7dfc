"""Laws of the network: its size, its initialization, its blocks, its precision, and what it refuses."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from diffusion.networks.layers import GroupNorm
from diffusion.networks.unet import ResidualBlock, UNet

TINY = UNet(channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=4, out_channels=1)
ONE_LEVEL = TINY.copy(channel_mult=(1,), attention_resolutions=())  # compiles faster where levels do not matter


def inputs(batch=2, height=8, width=8, channels=1):
    x = jax.random.normal(jax.random.key(0), (batch, height, width, channels))
    return x, jnp.arange(batch) * 300


def random_key(seed):
    return jax.random.key(seed, impl="rbg")  # compiles faster than the default generator


def random_params(module, *args):
    """Parameters of ordinary size everywhere; those of the initialization would hide half of the network."""
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: np.float32(rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))), params
    )


@partial(jax.jit, static_argnums=(0,))
def apply(unet, params, x, network_t):
    return unet.apply({"params": params}, x, network_t)


@partial(jax.jit, static_argnums=(0,))
def apply_with_dropout(unet, params, x, network_t, keys):
    return unet.apply({"params": params}, x, network_t, keys)


@cache
def param_shapes(unet, image_shape):
    init = partial(unet.init, jax.random.key(0))
    return jax.eval_shape(init, jnp.zeros((1, *image_shape)), jnp.zeros(1))["params"]


@pytest.fixture(scope="module")
def tiny_params():
    return random_params(TINY, *inputs())


@pytest.mark.parametrize("out_channels, num_params", [(3, 35_746_307), (6, 35_746_307 + 3_459)])
def test_ho_et_al_network_has_the_published_number_of_parameters(out_channels, num_params):
    params = param_shapes(UNet(out_channels=out_channels), (32, 32, 3))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == num_params


def test_attention_follows_every_block_at_16x16_and_sits_in_the_middle():
    modules = param_shapes(UNet(), (32, 32, 3)).keys()
    assert {name for name in modules if "attention" in name} == {
        "down_1_attention_0", "down_1_attention_1",
        "mid_attention",
        "up_1_attention_0", "up_1_attention_1", "up_1_attention_2",
    }  # fmt: skip


def test_a_network_may_have_attention_only_in_the_middle_or_none():
    straight = TINY.copy(channel_mult=(1,), attention_resolutions=())
    for mid_attention, found in ((True, {"mid_attention"}), (False, set())):
        modules = param_shapes(straight.copy(mid_attention=mid_attention), (8, 8, 1)).keys()
        assert {name for name in modules if "attention" in name} == found
        assert not [name for name in modules if "sample" in name]


def test_initial_output_and_residual_branches_are_nearly_but_not_exactly_zero():
    x, network_t = inputs()
    params = jax.jit(TINY.init)(random_key(0), x, network_t)["params"]
    output = np.abs(apply(TINY, params, x, network_t))
    assert 0 < output.max() < 1e-3
    for path, leaf in flatten_dict(params).items():
        if path[-1] == "kernel":
            # Uniform on (-a, a) with a = sqrt(3 * scale / mean of fan-in and fan-out).
            *window, fan_in, fan_out = leaf.shape
            scale = 1e-10 if path[-2] in ("conv_2", "projection", "conv_out") else 1.0
            bound = np.sqrt(3 * scale / (np.prod(window) * (fan_in + fan_out) / 2))
            assert 0.8 * bound < np.abs(leaf).max() <= bound * (1 + 1e-6), path
        else:
            assert np.all(leaf == (1.0 if path[-1] == "scale" else 0.0)), path


def test_every_norm_of_the_network_adds_norm_eps():
    found = {}

    def note(call, args, kwargs, context):
        if isinstance(context.module, GroupNorm):
            found[context.module.path] = context.module.eps
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        shapes = jax.eval_shape(TINY.copy(norm_eps=0.125).init, jax.random.key(0), *inputs())["params"]
    assert found.keys() == {path[:-1] for path in flatten_dict(shapes) if path[-1] == "scale"}
    assert set(found.values()) == {0.125} and UNet().norm_eps == 1e-6


def test_fourier_features_change_only_the_first_convolution():
    plain = flatten_dict(param_shapes(TINY, (8, 8, 1)))
    featured = flatten_dict(param_shapes(TINY.copy(fourier_features=(2, 3, 4)), (8, 8, 1)))
    assert {path for path in plain if plain[path].shape != featured[path].shape} == {("conv_in", "kernel")}
    assert featured["conv_in", "kernel"].shape == (3, 3, 7, 8)


def test_patches_are_the_channels_of_a_smaller_map():
    patched, (x, network_t) = ONE_LEVEL.copy(patch_size=2), inputs()
    plain = ONE_LEVEL.copy(out_channels=4)
    quarters = np.concatenate([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], axis=-1)  # rows first
    params = random_params(patched, x, network_t)
    expected = np.asarray(apply(plain, params, quarters, network_t))
    found = np.asarray(apply(patched, params, x, network_t))
    for k, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        np.testing.assert_allclose(found[:, i::2, j::2, 0], expected[..., k], rtol=1e-5, atol=1e-6)


def test_downsampling_pads_at_the_bottom_and_right_only(tiny_params):
    """Output [i, j] of the strided convolution reads inputs [2i ... 2i+2, 2j ... 2j+2] and none before."""
    x, network_t = inputs(batch=1)
    capture = partial(TINY.apply, capture_intermediates=lambda module, _: (module.name or "").startswith("down"))
    maps = jax.jit(capture)({"params": tiny_params}, x, network_t)[1]["intermediates"]
    h = np.pad(maps["down_0_block_0"]["__call__"][0][0], ((0, 1), (0, 1), (0, 0)))
    kernel, bias = tiny_params["down_0_downsample"]["kernel"], tiny_params["down_0_downsample"]["bias"]
    expected = [
        [np.einsum("ijc,ijco->o", h[2 * i : 2 * i + 3, 2 * j : 2 * j + 3], kernel) + bias for j in range(4)]
        for i in range(4)
    ]
    np.testing.assert_allclose(maps["down_0_downsample"]["__call__"][0][0], expected, atol=1e-5)


@pytest.mark.parametrize("scale_shift", [False, True])
def test_time_acts_on_a_block_as_an_addition_or_as_a_scale_and_shift(scale_shift):
    """The block recomputed from its layers."""
    h = jax.random.normal(jax.random.key(4), (1, 4, 4, 8))
    embedding = jax.random.normal(jax.random.key(5), (1, 6))
    block = ResidualBlock(features=8, num_groups=4, dropout=0.0, scale_shift_norm=scale_shift, dtype="float32")
    params = random_params(block, h, embedding, None)
    norm = GroupNorm(4)
    conv = nn.Conv(8, (3, 3))
    time = np.asarray(nn.swish(embedding)) @ params["time"]["kernel"] + params["time"]["bias"]
    expected = conv.apply({"params": params["conv_1"]}, nn.swish(norm.apply({"params": params["norm_1"]}, h)))
    if scale_shift:
        expected = norm.apply({"params": params["norm_2"]}, expected)
        expected = expected * (1 + time[0, None, None, None, :8]) + time[0, None, None, None, 8:]
    else:
        expected = norm.apply({"params": params["norm_2"]}, expected + time[:, None, None])
    expected = h + conv.apply({"params": params["conv_2"]}, nn.swish(expected))
    np.testing.assert_allclose(block.apply({"params": params}, h, embedding, None), expected, atol=1e-5)


def test_examples_do_not_see_one_another_and_vmap_is_the_batch():
    x, network_t = inputs(batch=3, height=4, width=6)
    params = random_params(ONE_LEVEL, x, network_t)
    together = apply(ONE_LEVEL, params, x, network_t)
    one_by_one = jax.vmap(lambda x, t: ONE_LEVEL.apply({"params": params}, x[None], t[None])[0])
    np.testing.assert_allclose(jax.jit(one_by_one)(x, network_t), together, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-2


def test_output_depends_on_time(tiny_params):
    x, network_t = inputs()
    same_x = jnp.stack([x[0], x[0]])
    output = apply(TINY, tiny_params, same_x, network_t)
    assert np.abs(output[0] - output[1]).max() > 1e-2


def test_bfloat16_is_close_to_float32_and_keeps_float32_outside(tiny_params):
    x, network_t = inputs()
    half = TINY.copy(dtype="bfloat16")
    params = jax.eval_shape(partial(half.init, jax.random.key(0)), x, network_t)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    exact, rounded = apply(TINY, tiny_params, x, network_t), apply(half, tiny_params, x, network_t)
    assert rounded.dtype == jnp.float32
    error = np.linalg.norm(exact - rounded) / np.linalg.norm(exact)
    assert 1e-5 < error < 0.03  # it did compute in bfloat16, whose rounding is 2^-9


@pytest.mark.slow
def test_remat_changes_neither_parameters_nor_values_nor_gradients():
    x, network_t = inputs(height=4, width=4)
    params = random_params(ONE_LEVEL, x, network_t)
    remat = ONE_LEVEL.copy(remat=True)
    assert param_shapes(remat, (4, 4, 1)) == param_shapes(ONE_LEVEL, (4, 4, 1))

    def loss(unet, params):
        keys = jax.random.split(random_key(6), len(x))
        return jnp.mean(unet.apply({"params": params}, x, network_t, keys) ** 2)

    value, gradient = jax.jit(jax.value_and_grad(partial(loss, ONE_LEVEL)))(params)
    remat_value, remat_gradient = jax.jit(jax.value_and_grad(partial(loss, remat)))(params)
    np.testing.assert_allclose(remat_value, value, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), remat_gradient, gradient)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient))
    assert "remat" in str(jax.make_jaxpr(partial(loss, remat))(params))


def test_dropout_acts_where_keys_are_given_and_follows_them():
    x, network_t = inputs(height=4, width=4)
    params = random_params(ONE_LEVEL, x, network_t)
    keys = [jax.random.split(random_key(seed), len(x)) for seed in (7, 7, 8)]
    first, again, other = (apply_with_dropout(ONE_LEVEL, params, x, network_t, key) for key in keys)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    without = apply(ONE_LEVEL, params, x, network_t)
    np.testing.assert_array_equal(without, apply(ONE_LEVEL.copy(dropout=0.5), params, x, network_t))
    assert np.abs(first - without).max() > 1e-3


def test_an_example_keeps_its_dropout_wherever_it_stands_in_the_batch():
    x, network_t = inputs(batch=3, height=4, width=4)
    params = random_params(ONE_LEVEL, x, network_t)
    forward = partial(apply_with_dropout, ONE_LEVEL, params)
    keys = jax.random.split(jax.random.key(9), 3)
    order = np.array([2, 0, 1])
    moved = forward(x[order], network_t[order], keys[order])
    np.testing.assert_allclose(moved, forward(x, network_t, keys)[order], rtol=0, atol=1e-5)


def test_every_block_drops_for_itself():
    h, embedding = jax.random.normal(jax.random.key(4), (1, 4, 4, 8)), jax.random.normal(jax.random.key(5), (1, 6))
    fields = {"features": 8, "num_groups": 4, "dropout": 0.5, "scale_shift_norm": False, "dtype": "float32"}
    params = random_params(ResidualBlock(**fields), h, embedding, None)
    keys = jax.random.split(jax.random.key(11), 1)
    first, again, other = (
        np.asarray(ResidualBlock(**fields, name=name).apply({"params": params}, h, embedding, keys))
        for name in ("down_0_block_0", "down_0_block_0", "down_0_block_1")
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


@pytest.mark.parametrize("image_shape", [(8, 8, 1), (64, 64, 3), (16, 24, 2)])
def test_output_has_the_shape_of_the_image(image_shape):
    unet = TINY.copy(channel_mult=(1, 2, 2), attention_resolutions=(), out_channels=2 * image_shape[-1])
    x = jnp.zeros((2, *image_shape))
    output = jax.eval_shape(lambda: unet.init_with_output(jax.random.key(0), x, jnp.zeros(2))[0])
    assert (output.shape, output.dtype) == ((2, *image_shape[:2], 2 * image_shape[2]), jnp.float32)


@pytest.mark.parametrize(
    "changes, image_shape, key",
    [
        ({}, (9, 8, 1), r"unet\.channel_mult=\(1, 2\) .* 2, not 9×8"),
        ({"channel_mult": (1, 1, 1, 1, 1)}, (8, 8, 1), r"unet\.channel_mult.* 16, not 8×8"),
        ({"channel_mult": ()}, (8, 8, 1), r"unet\.channel_mult=\(\) must be integers ≥ 1"),
        ({"channel_mult": (1, 0)}, (8, 8, 1), r"unet\.channel_mult=\(1, 0\) must be integers ≥ 1"),
        ({"channel_mult": (1, 2**14)}, (8, 8, 1), r"unet\.channel_mult=.* no map wider than 65536 channels"),
        ({"channels": 2**33}, (8, 8, 1), r"unet\.channels=8589934592 must be even and in 4…65536"),
        ({"num_res_blocks": 0}, (8, 8, 1), r"unet\.num_res_blocks=0 must be in 1…256"),
        ({"num_res_blocks": 10**9}, (8, 8, 1), r"unet\.num_res_blocks=1000000000 must be in 1…256"),
        ({"dropout": 1.0}, (8, 8, 1), r"unet\.dropout=1\.0 must be in \[0, 1\)"),
        ({"norm_eps": 0.0}, (8, 8, 1), r"unet\.norm_eps=0\.0 must be in \(0, 1\)"),
        ({"patch_size": 0}, (8, 8, 1), "unet.patch_size=0 must be in 1…"),
        ({"patch_size": 3}, (8, 8, 1), "unet.patch_size=3 divides them, so .* multiples of 6, not 8×8"),
        ({"patch_size": 4}, (8, 8, 1), r"unet.attention_resolutions=\(4,\) .* 8×8 image's levels, \[2, 1\]"),
        ({"fourier_features": (2, -1)}, (8, 8, 1), r"unet\.fourier_features=\(2, -1\) must be in 0…24, or \(\)"),
        ({"fourier_features": (10**9,)}, (8, 8, 1), r"unet\.fourier_features=\(1000000000,\) must be in 0…24, or \(\)"),
        ({"num_groups": 3}, (8, 8, 1), r"unet\.num_groups=3 .*\[8, 16\]"),
        ({"channels": 4, "channel_mult": (2, 2), "num_groups": 8}, (8, 8, 1), r"unet\.num_groups=8 .*\[4, 8\]"),
        ({"num_heads": 3}, (8, 8, 1), r"unet\.num_heads=3 .*\[8, 16\]"),
        ({"channels": 5, "num_groups": 5}, (8, 8, 1), r"unet\.channels=5"),
        ({"attention_resolutions": (16,)}, (8, 8, 1), r"unet\.attention_resolutions=\(16,\) .*\[8, 4\]"),
    ],
)
def test_what_does_not_fit_is_refused_before_compilation(changes, image_shape, key):
    unet = dataclasses.replace(TINY, **changes)
    with pytest.raises(ValueError, match=key):
        unet.check(image_shape)
    with pytest.raises(ValueError, match=key):
        param_shapes(unet, image_shape)


# --- labels


def test_a_label_adds_its_own_vector_to_the_time_embedding_and_none_adds_nothing():
    labelled, (x, network_t) = ONE_LEVEL.copy(num_classes=3), inputs(batch=4)
    params = random_params(labelled, x, network_t)
    output = jax.jit(labelled.apply)({"params": params}, x, network_t, None, jnp.array([0, 2, -1, 1]))
    plain = {name: leaf for name, leaf in params.items() if name != "label"}
    for i, label in enumerate([0, 2, None, 1]):
        shifted = plain
        if label is not None:
            bias = plain["time_2"]["bias"] + params["label"]["embedding"][label]
            shifted = plain | {"time_2": plain["time_2"] | {"bias": bias}}
        alone = apply(ONE_LEVEL, shifted, x[i : i + 1], network_t[i : i + 1])
        np.testing.assert_allclose(output[i : i + 1], alone, rtol=1e-4, atol=1e-4)  # outputs of size 1 to 10


def test_a_network_with_classes_asks_for_labels():
    labelled, (x, network_t) = ONE_LEVEL.copy(num_classes=3), inputs()
    params = random_params(labelled, x, network_t)
    with pytest.raises(ValueError, match="is given labels of 3 classes"):
        labelled.apply({"params": params}, x, network_t)
