"""Laws of ADM: the effects of its fields, its errors, and its place in a config.

tests/interop/test_openai.py compares its numbers with those of the original code.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import digits_fixed
from diffusion.experiment import build
from diffusion.networks import adm as adm_module
from diffusion.networks.adm import ADM
from diffusion.networks.layers import doubled, halved

TINY = ADM(channels=8, channel_mult=(0.5, 1), num_res_blocks=1, attention_resolutions=(8,), num_groups=2, num_heads=2)


@cache
def param_shapes(adm, image_shape=(8, 8, 3)):
    params = jax.eval_shape(adm.init, jax.random.key(0), jnp.zeros((1, *image_shape)), jnp.zeros(1))["params"]
    return {"/".join(path): leaf.shape for path, leaf in flatten_dict(params).items()}


def test_fractions_of_the_channels_make_the_widths_and_the_time_embedding_has_all_channels():
    shapes = param_shapes(TINY)
    assert shapes["conv_in/kernel"] == (3, 3, 3, 4) and shapes["conv_out/kernel"] == (3, 3, 4, 6)
    assert shapes["mid_block_0/conv_1/kernel"] == (3, 3, 8, 8)
    assert shapes["time_1/kernel"] == (8, 32)
    attentions = {name.split("/")[0] for name in shapes if "/query/" in name}
    assert attentions == {"down_0_attention_0", "mid_attention", "up_0_attention_0", "up_0_attention_1"}


def test_the_map_is_halved_and_doubled_by_convolutions_or_by_blocks():
    assert {n for n in param_shapes(TINY) if "sample" in n and n.endswith("kernel")} == {
        "down_0_downsample/kernel", "up_1_upsample/kernel",
    }  # fmt: skip
    by_blocks = param_shapes(TINY.copy(block_resampling=True, remat=True, dropout=0.5))
    assert {n for n in by_blocks if "downsample" in n and n.endswith("kernel")} == {
        "down_0_downsample/conv_1/kernel", "down_0_downsample/conv_2/kernel", "down_0_downsample/time/kernel",
    }  # fmt: skip


def test_halved_is_the_mean_of_squares_and_undoes_doubled():
    h = jnp.arange(2 * 4 * 6 * 3, dtype=jnp.float32).reshape(2, 4, 6, 3)
    np.testing.assert_array_equal(halved(doubled(h)), h)
    np.testing.assert_allclose(halved(h)[1, 1, 2], h[1, 2:, 4:].mean(axis=(0, 1)), rtol=1e-6)
    np.testing.assert_array_equal(doubled(h)[:, 1::2, ::2], h)


@pytest.mark.parametrize(
    ("fields", "up", "heads"),
    [
        ({"num_heads": 4}, False, 4),
        ({"num_heads": 4}, True, 4),
        ({"num_heads": 4, "num_heads_up": 2}, False, 4),
        ({"num_heads": 4, "num_heads_up": 2}, True, 2),
        ({"num_heads": 4, "num_heads_up": 2, "head_channels": 16}, True, 3),
    ],
)
def test_heads_go_by_their_channels_or_by_their_number(fields, up, heads):
    assert ADM(**fields).heads(48, up) == heads


def test_the_time_embedding_has_its_cosines_first_and_the_original_frequencies():
    found = adm_module.time_embedding(jnp.asarray([0, 999]), 6)
    angles = 999 * 10_000.0 ** (-np.arange(3) / 3)
    np.testing.assert_allclose(found, [[1, 1, 1, 0, 0, 0], [*np.cos(angles), *np.sin(angles)]], atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({"channels": 7}, 8, "adm.channels=7 must be even"),
        ({"channel_mult": ()}, 8, r"adm.channel_mult=\(\) must make widths"),
        ({"channel_mult": (0.1,)}, 8, r"adm.channel_mult=\(0.1,\) must make widths"),
        ({"num_res_blocks": 0}, 8, "adm.num_res_blocks=0 must be in 1"),
        ({"dropout": 1.0}, 8, "adm.dropout=1.0 must be in"),
        ({"norm_eps": 0.0}, 8, "adm.norm_eps=0.0 must be in"),
        ({"num_heads": 0}, 8, "adm.num_heads=0 must be at least 1"),
        ({"head_channels": -1}, 8, "adm.head_channels=-1 must be at least 0"),
        ({"num_groups": 3}, 8, r"adm.num_groups=3 must divide the width of every level, \[4, 8\]"),
        ({"num_heads_up": 3}, 8, r"adm.num_heads_up=3 must divide the width of every map with attention, \[4, 8\]"),
        ({"head_channels": 3}, 8, r"adm.head_channels=3 must divide the width of every map with attention, \[4, 8\]"),
        ({}, 7, "needs a height and a width that are multiples of 2, not 7×7"),
        ({"attention_resolutions": (2,)}, 8, r"adm.attention_resolutions=\(2,\) may only name heights .*\[8, 4\]"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_config_key(changes, size, message):
    adm = TINY.copy(**changes)
    with pytest.raises(ValueError, match=message):
        adm.check((size, size, 3))


def test_a_config_chooses_it_by_name_with_its_fields_as_arguments():
    config = digits_fixed.get_config()
    fields = "channels=8, channel_mult=(0.5, 1), num_groups=2, num_heads=2, attention_resolutions=(4,)"
    config.model.network = f"adm({fields})"
    training = build.experiment(config, (8, 8, 1), 17, on_cpu=True).training
    assert training.network == ADM(
        channels=8,
        channel_mult=(0.5, 1),
        num_groups=2,
        num_heads=2,
        attention_resolutions=(4,),
        out_channels=2,  # the config learns the variance
        convolution="winograd",
    )
    config.model.network = "adm(channel_mult=(1, 'wide'))"
    with pytest.raises(ValueError, match="channel_mult of adm must be a tuple of numbers"):
        build.experiment(config, (8, 8, 1), 17)
