"""Published weights: reference values of a tiny network, the way back, and every kind of damage by name."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file, save_file

from diffusion import interop
from diffusion.networks.unet import UNet

GOLDEN = Path(__file__).parents[1] / "golden"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def published(tmp_path):
    """A directory with the tiny network under the published names."""
    shutil.copyfile(GOLDEN / "unet_tiny.json", tmp_path / "config.json")
    shutil.copyfile(GOLDEN / "unet_tiny.safetensors", tmp_path / WEIGHTS)
    return tmp_path


def change_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value != "absent"}
    (directory / "config.json").write_text(json.dumps(config))


def test_tiny_network_gives_its_published_output(published):
    unet, params = interop.load_diffusers(published)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 143_267
    reference = np.load(GOLDEN / "unet_tiny_io.npz")
    x, network_t = jnp.asarray(reference["x"]), jnp.asarray(reference["network_t"])
    output = jax.jit(unet.apply)({"params": params}, x, network_t)
    assert np.linalg.norm(output - reference["y"]) < 5e-6 * np.linalg.norm(reference["y"])


def test_config_becomes_fields(published):
    unet, _ = interop.load_diffusers(published)
    assert unet == UNet(
        channels=8, channel_mult=(1, 2, 2, 2), attention_resolutions=(8,), num_groups=4, dropout=0.0, out_channels=3
    )


@pytest.mark.parametrize(("said", "meant"), [(1e-4, 1e-4), ("absent", 1e-5)])
def test_the_eps_of_the_norms_is_read_and_written(published, tmp_path, said, meant):
    unet, params = interop.load_diffusers(published)
    change_config(published, norm_eps=said)
    other, _ = interop.load_diffusers(published)
    assert other == unet.copy(norm_eps=meant) and unet.norm_eps == 1e-6
    interop.save_diffusers(tmp_path / "again", other, params, sample_size=16)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["norm_eps"] == meant


def test_old_attention_names_are_the_same_network(published):
    _, params = interop.load_diffusers(published)
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(published / WEIGHTS).items():
        for new, old in old_names.items():
            name = name.replace(new, old)
        tensors[name] = tensor
    assert sum("proj_attn" in name for name in tensors) == 2 * 6
    save_file(tensors, published / WEIGHTS)
    jax.tree.map(np.testing.assert_array_equal, interop.load_diffusers(published)[1], params)


def test_saving_what_was_loaded_writes_the_same_tensors_and_config(published, tmp_path):
    unet, params = interop.load_diffusers(published)
    interop.save_diffusers(tmp_path / "new" / "directory", unet, params, sample_size=16)
    before, after = load_file(published / WEIGHTS), load_file(tmp_path / "new" / "directory" / WEIGHTS)
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name, strict=True)
    config = json.loads((published / "config.json").read_text())
    written = json.loads((tmp_path / "new" / "directory" / "config.json").read_text())
    assert {key: written[key] for key in config if config[key] is not None} == {
        key: value for key, value in config.items() if value is not None
    }
    assert interop.load_diffusers(tmp_path / "new" / "directory")[0] == unet


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"flip_sin_to_cos": True}, "flip_sin_to_cos=True cannot"),
        ({"freq_shift": "absent"}, "freq_shift=0 cannot"),  # what its absence means
        ({"attention_head_dim": 8}, "attention_head_dim=8 cannot"),
        ({"act_fn": "gelu"}, "act_fn='gelu' cannot"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D", "DownBlock2D", "DownBlock2D"]}, "down_block_types"),
        ({"up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"]}, "up_block_types"),
        ({"block_out_channels": [8, 12, 16, 16]}, "block_out_channels"),
        ({"block_out_channels": [8, 16, 16]}, "down_block_types"),
        ({"sample_size": None}, "sample_size=None"),
        ({"sample_size": "absent"}, "sample_size must be given"),
        ({"sample_size": 12}, "multiples of 8, not 12×12"),
        ({"norm_num_groups": 3}, r"unet\.num_groups=3"),
        ({"layers_per_block": 2.5}, "layers_per_block=2.5"),
        ({"norm_eps": 0.0}, "norm_eps=0.0 must be a number in"),
        ({"norm_eps": "1e-5"}, "norm_eps='1e-5' must be a number in"),
        ({"encoder_hid_dim": 4}, "encoder_hid_dim=4"),
    ],
)
def test_config_that_cannot_be_represented_is_refused_by_key(published, changes, message):
    change_config(published, **changes)
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        interop.load_diffusers(published)


def test_damaged_tensors_are_named_and_counted(published):
    tensors = load_file(published / WEIGHTS)
    del tensors["conv_in.bias"]
    tensors["conv_in.gain"] = np.zeros(8, np.float32)
    tensors["conv_out.weight"] = tensors["conv_out.weight"][:2]
    save_file(tensors, published / WEIGHTS)
    named = (
        r"safetensors: conv_in\.bias is missing; conv_in\.gain is extra; "
        r"conv_out\.weight is \(2, 8, 3, 3\) instead of \(3, 8, 3, 3\)"
    )
    with pytest.raises(ValueError, match=f"{named}$"):
        interop.load_diffusers(published)
    del tensors["time_embedding.linear_1.bias"]
    save_file(tensors, published / WEIGHTS)
    with pytest.raises(ValueError, match=f"{named} and 1 more$"):
        interop.load_diffusers(published)


def test_half_precision_is_converted_after_a_warning_and_integers_are_refused(published, caplog):
    _, params = interop.load_diffusers(published)
    tensors = load_file(published / WEIGHTS)
    assert not caplog.records
    save_file({name: tensor.astype(np.float16) for name, tensor in tensors.items()}, published / WEIGHTS)
    _, converted = interop.load_diffusers(published)
    assert "half precision (F16); converted to float32" in caplog.text

    def is_rounded(found, exact):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, np.float32(np.float16(exact)))

    jax.tree.map(is_rounded, converted, params)
    save_file(tensors | {"conv_out.bias": np.zeros(3, np.int32)}, published / WEIGHTS)
    with pytest.raises(ValueError, match="the weights are I32, not floats of 32 or 16 bits"):
        interop.load_diffusers(published)


def shard(directory, index_name):
    """The weights in two files and a list of which is where."""
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    names = sorted(tensors)
    files = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, chosen in files.items():
        save_file({name: tensors[name] for name in chosen}, directory / file)
    weight_map = {name: file for file, chosen in files.items() for name in chosen}
    (directory / index_name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("index_name", [f"{WEIGHTS}.index.json", f"{WEIGHTS}.index.fp16.json"])
def test_shards_are_the_same_network(published, index_name):
    _, whole = interop.load_diffusers(published)
    shard(published, index_name)
    _, joined = interop.load_diffusers(published)
    jax.tree.map(np.testing.assert_array_equal, whole, joined)
    (published / "two.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="two.safetensors does not exist, but .* names it"):
        interop.load_diffusers(published)
    (published / index_name).write_text("{}")
    with pytest.raises(ValueError, match="is damaged: it has no weight_map"):
        interop.load_diffusers(published)


def test_a_pipeline_s_folder_holds_the_network_in_unet(published, tmp_path):
    _, whole = interop.load_diffusers(published)
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    shutil.copytree(published, pipeline / "unet", ignore=shutil.ignore_patterns("pipeline"))
    (pipeline / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    _, found = interop.load_diffusers(pipeline)
    jax.tree.map(np.testing.assert_array_equal, whole, found)


def test_a_half_precision_variant_is_read_where_there_is_no_other(published, caplog):
    _, whole = interop.load_diffusers(published)
    halves = {name: tensor.astype(np.float16) for name, tensor in load_file(published / WEIGHTS).items()}
    save_file(halves, published / WEIGHTS.replace(".safetensors", ".fp16.safetensors"))
    interop.load_diffusers(published)
    assert "half precision" not in caplog.text  # the file in full precision comes first
    (published / WEIGHTS).unlink()
    _, found = interop.load_diffusers(published)
    assert "half precision (F16); converted to float32" in caplog.text
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7), whole, found)


def test_a_tensor_under_its_old_and_new_name_is_refused(published):
    tensors = load_file(published / WEIGHTS)
    tensors["mid_block.attentions.0.query.bias"] = tensors["mid_block.attentions.0.to_q.bias"] + 1
    save_file(tensors, published / WEIGHTS)
    with pytest.raises(ValueError, match=r"mid_block\.attentions\.0\.query\.bias is extra"):
        interop.load_diffusers(published)


def test_a_tensor_with_a_nan_is_named(published):
    tensors = load_file(published / WEIGHTS)
    tensors["conv_norm_out.bias"][3] = np.nan
    save_file(tensors, published / WEIGHTS)
    with pytest.raises(ValueError, match=r"NaN or Inf in conv_norm_out\.bias"):
        interop.load_diffusers(published)


@pytest.mark.parametrize("damage", ["truncated", "offsets", "length", "empty", "not json"])
def test_a_file_with_a_lying_header_is_refused_in_one_line(published, damage):
    content = (published / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    content = {
        "truncated": content[:-100],
        "offsets": content[:8] + header.replace(b'"data_offsets":[0,', b'"data_offsets":[9,') + data,
        "length": (2**62).to_bytes(8, "little") + header + data,
        "empty": b"",
        "not json": content[:8] + b"x" * length + data,
    }[damage]
    assert content != (published / WEIGHTS).read_bytes()
    (published / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: ") as error:
        interop.load_diffusers(published)
    assert "\n" not in str(error.value)


def test_missing_files_and_broken_json_name_the_file(published):
    (published / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: "):
        interop.load_diffusers(published)
    (published / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"safetensors does not exist"):
        interop.load_diffusers(published)


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"scale_shift_norm": True}, r"unet\.scale_shift_norm=True .*; --mode=export saves any model"),
        ({"patch_size": 2}, r"unet\.patch_size=2 .*; --mode=export"),
        ({"fourier_features": (2,)}, r"unet\.fourier_features=\(2,\) .*; --mode=export"),
        ({"num_heads": 2}, r"unet\.num_heads=2 .*; --mode=export"),
        ({"channel_mult": (2, 2, 2, 2)}, r"unet\.channel_mult=\(2, 2, 2, 2\) .*; --mode=export"),
        ({"num_res_blocks": 1}, r"down_0_block_1/conv_1/kernel is extra"),
        ({"out_channels": 6}, r"conv_out/kernel is \(3, 3, 8, 3\) instead of \(3, 3, 8, 6\)"),
    ],
)
def test_saving_what_the_layout_has_no_place_for_is_refused(published, tmp_path, changes, key):
    unet, params = interop.load_diffusers(published)
    with pytest.raises(ValueError, match=key):
        interop.save_diffusers(tmp_path / "new", unet.copy(**changes), params, sample_size=16)
    assert not (tmp_path / "new").exists()


def test_what_is_no_published_network_at_all_is_sent_to_the_export(published, tmp_path):
    unet, params = interop.load_diffusers(published)
    others = {
        "a learned schedule has no place": (unet, params | {"schedule": {"gamma_1": np.float32(0)}}),
        "a Dense has no place": (nn.Dense(3), params),
    }
    for words, model in others.items():
        with pytest.raises(ValueError, match=f"^{words} in the published layout.*; --mode=export"):
            interop.save_diffusers(tmp_path / "new", *model, sample_size=16)


def test_a_class_conditional_network_is_read_and_written_with_its_embedding(published, tmp_path):
    unet, params = interop.load_diffusers(published)
    tensors, rng = load_file(published / WEIGHTS), np.random.default_rng(0)
    tensors["class_embedding.weight"] = rng.normal(size=(5, 32)).astype(np.float32)  # [classes, 4 × width]
    save_file(tensors, published / WEIGHTS)
    with pytest.raises(ValueError, match=r"class_embedding\.weight is extra"):
        interop.load_diffusers(published)
    change_config(published, num_class_embeds=5)
    labelled, more = interop.load_diffusers(published)
    assert labelled == unet.copy(num_classes=5)
    np.testing.assert_array_equal(more["label"]["embedding"], tensors["class_embedding.weight"])
    interop.save_diffusers(tmp_path / "again", labelled, more, sample_size=16)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["num_class_embeds"] == 5
    for name, tensor in load_file(tmp_path / "again" / WEIGHTS).items():
        np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)
    reference = np.load(GOLDEN / "unet_tiny_io.npz")
    x, network_t = jnp.asarray(reference["x"]), jnp.asarray(reference["network_t"])
    no_labels = jnp.full(len(x), -1)
    output = jax.jit(labelled.apply)({"params": more}, x, network_t, labels=no_labels)
    assert np.linalg.norm(output - reference["y"]) < 5e-6 * np.linalg.norm(reference["y"])


@pytest.mark.parametrize("value", [0, 2.5, "ten"])
def test_a_number_of_classes_that_is_none_is_refused(published, value):
    change_config(published, num_class_embeds=value)
    with pytest.raises(ValueError, match=f"num_class_embeds={value!r} must consist of positive integers"):
        interop.load_diffusers(published)
