"""Checkpoints of Ho et al.'s code: TensorFlow's file, the original network's outputs, and errors."""

import json
import re
from functools import cache, partial
from pathlib import Path

import ho2020_cases
import jax
import numpy as np
import pytest

from diffusion import interop, schedules
from diffusion.experiment import init_from
from diffusion.interop import ho2020, tensor_bundle
from diffusion.interop.crc32c import crc32c

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "ho2020.npz")
NAMES = [str(name) for name in GOLDEN["names"]]
SHAPES_OF = dict(zip(NAMES, (tuple(filter(None, shape.tolist())) for shape in GOLDEN["shapes"]), strict=True))
EMA = "/ExponentialMovingAverage"


@pytest.fixture(autouse=True)
def shapes_are_traced_once(monkeypatch):
    monkeypatch.setattr(ho2020, "_param_shapes", SHAPES)


SHAPES = cache(ho2020._param_shapes)


@cache
def tensors():
    return ho2020_cases.weights(NAMES, list(SHAPES_OF.values()))


@pytest.fixture
def prefix(tmp_path):
    """The checkpoint that TensorFlow wrote: its index, and the data that its own reader would find."""
    prefix = tmp_path / ho2020_cases.PREFIX
    Path(f"{prefix}.index").write_bytes(GOLDEN["index"].tobytes())
    Path(f"{prefix}.data-00000-of-00001").write_bytes(ho2020_cases.data(tensors()))
    return prefix


def test_the_crc_is_castagnoli_s():
    # RFC 3720, appendix B.4
    assert crc32c(b"") == 0 and crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA and crc32c(bytes([255]) * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E and crc32c(bytes(range(31, -1, -1))) == 0x113FDB5C
    slow = 0xFFFFFFFF
    data = np.random.default_rng(0).bytes(9_001)  # many lanes, and a remainder
    for byte in data:
        slow ^= byte
        for _ in range(8):
            slow = slow >> 1 ^ (0x82F63B78 if slow & 1 else 0)
    assert crc32c(data) == slow ^ 0xFFFFFFFF


def test_every_tensor_is_the_one_that_tensorflow_wrote(prefix):
    bundle = tensor_bundle.open_bundle(prefix)
    assert bundle.num_shards == 1 and {name: entry.shape for name, entry in bundle.entries.items()} == SHAPES_OF
    some = ["global_step", "beta1_power", "model/conv_in/W", "model/conv_in/W/Adam_1", f"model/conv_out/b{EMA}"]
    for name, tensor in tensor_bundle.read(bundle, some).items():
        np.testing.assert_array_equal(tensor, tensors()[name], strict=True)


@partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles sooner
def denoise(model, x, t):
    return model.denoise(x, t)


def test_outputs_are_those_of_the_original_network_with_its_averaged_parameters(prefix):
    model = interop.load_ho2020(prefix.parent)
    given = ho2020_cases.inputs()
    output = denoise(model, given["x"], given["t"])
    np.testing.assert_allclose(output, GOLDEN["output"], rtol=1e-5, atol=1e-5)
    assert np.abs(GOLDEN["output"]).max() > 0.5
    assert (model.p.prediction, model.p.variance, model.num_levels) == ("eps", "fixed_large", 256)
    np.testing.assert_array_equal(model.schedule.beta, schedules.linear(1000).beta)
    assert ho2020.image_shape(model) == (32, 32, 3)


def test_training_starts_from_it(prefix):
    found, there = init_from._read(str(prefix))
    kernel = found["up_1_attention_0/query/kernel"]
    np.testing.assert_array_equal(kernel, tensors()[f"model/up_1/attn_0/q/W{EMA}"])
    assert (there["unet.channel_mult"], there["model.prediction"], there["schedule.num_steps"]) == ((1, 2), "eps", 1000)


def entries(**changes):
    """Names and shapes of the EMA, some of which are changed or left out (None)."""
    shapes = {name.removesuffix(EMA): shape for name, shape in SHAPES_OF.items() if name.endswith(EMA)} | changes
    return {name: shape for name, shape in shapes.items() if shape is not None}


BIAS, KERNEL, NORM = "model/conv_in/b", "model/up_1/block_0/conv1/W", "model/down_0/block_0/norm1/beta"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({BIAS: None}, f"{BIAS} is missing"),
        ({NORM: None, "model/up_9/b": (3,)}, f"{NORM} is missing; model/up_9/b is extra"),
        ({KERNEL: (3, 3, 96, 64)}, rf"{KERNEL} is \(3, 3, 96, 64\) instead of \(3, 3, 128, 64\)"),
        ({"model/conv_in/W": None}, "model/conv_in/W is missing"),
        ({"model/conv_out/W": (3, 3)}, r"model/conv_out/W is \(3, 3\)"),
        ({"model/down_1/block_0/conv1/W": (3, 3, 32, 40)}, r"the widths \[32, 40\] are not multiples"),
        ({"model/down_0/attn_0/q/W": (32, 32)}, r"attention at levels \[0, 1\] cannot be represented"),
    ],
)
def test_variables_of_another_network_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        ho2020._network(entries(**changes))


def test_files_that_are_cut_or_damaged_are_refused(prefix):
    index, data = Path(f"{prefix}.index"), Path(f"{prefix}.data-00000-of-00001")
    whole, tensors_whole = index.read_bytes(), data.read_bytes()

    def refused(message, held=whole, tensors_held=tensors_whole):
        index.write_bytes(held)
        data.write_bytes(tensors_held)
        with pytest.raises(ValueError, match=f"^{re.escape(str(prefix))}[^\n]*{message}[^\n]*$"):
            tensor_bundle.read(tensor_bundle.open_bundle(prefix), ["model/conv_in/W", "model/temb/dense0/W"])

    entries = tensor_bundle.open_bundle(prefix).entries
    refused("it is truncated, or not the index of a tensor bundle", whole[:-1])
    refused("it is truncated, or not the index of a tensor bundle", b"")
    refused("it is damaged: the CRC-32C of a block is wrong", whole[:9] + b"!" + whole[10:])
    refused("it is damaged: a block lies outside the file", whole[-60:])
    end = entries["model/temb/dense0/W"].offset + 10
    refused("model/temb/dense0/W is truncated: the file ends 16374 bytes too early", tensors_held=tensors_whole[:end])
    place = entries["model/conv_in/W"].offset + 100
    bad = tensors_whole[:place] + b"\x00\xff" + tensors_whole[place + 2 :]
    refused("data-00000-of-00001: model/conv_in/W is damaged: its CRC-32C is wrong", tensors_held=bad)
    data.unlink()
    with pytest.raises(FileNotFoundError, match="data-00000-of-00001 does not exist"):
        interop.load_ho2020(prefix)


def test_a_tensor_with_a_nan_is_named(prefix, monkeypatch):
    name = f"model/temb/dense0/b{EMA}"

    def read(bundle, names):
        return {each: np.full(SHAPES_OF[each], np.inf if each == name else 0.0, np.float32) for each in names}

    monkeypatch.setattr(tensor_bundle, "read", read)
    with pytest.raises(ValueError, match=f"^{re.escape(str(prefix))}: NaN or Inf in {name}$"):
        interop.load_ho2020(prefix)


def test_shards_are_read_and_parts_are_not(tmp_path):
    def bundle(name):
        (tmp_path / f"{name}.index").write_bytes(GOLDEN[f"index_of_{name}"].tobytes())
        return tensor_bundle.open_bundle(tmp_path / name)

    for shard, size in enumerate((6, 5)):
        ones = np.ones(size, np.float32)
        (tmp_path / f"shards.data-0000{shard}-of-00002").write_bytes(ones.tobytes())
    found = tensor_bundle.read(bundle("shards"), ["a", "b"])
    np.testing.assert_array_equal(found["a"], np.ones((2, 3), np.float32), strict=True)
    np.testing.assert_array_equal(found["b"], np.ones(5, np.float32), strict=True)
    with pytest.raises(ValueError, match="parts.index: stored in parts, which cannot be read: parts$"):
        tensor_bundle.read(bundle("parts"), ["parts"])


def test_what_cannot_be_read_is_named(tmp_path):
    entry = tensor_bundle.Entry(1, (2,), 0, 0, 8, 0, is_sliced=False)

    def refused(message, read, **changes):
        bundle = tensor_bundle.Bundle(tmp_path / "a", 1, {f"model/x{EMA}": entry._replace(**changes)})
        with pytest.raises(ValueError, match=message):
            read(bundle)

    def one(bundle):
        return tensor_bundle.read(bundle, bundle.entries)

    refused(rf"a.index: dtypes that cannot be read: model/x{EMA} is 7$", one, dtype=7)
    refused("not float32, TensorFlow's dtype 1: model/x is 9$", ho2020._shadows, dtype=9)
    none = tensor_bundle.Bundle(tmp_path / "a", 1, {"model/x": entry})
    with pytest.raises(ValueError, match=f"no variable has a shadow …{EMA}; it holds model/x$"):
        ho2020._shadows(none)


def test_the_process_is_that_of_kwargs_json(tmp_path):
    file = tmp_path / "kwargs.json"
    network, channels = ho2020._network(entries())[::2]

    def process(unet=network, **kwargs):
        file.write_text(json.dumps({"lr": 2e-4, "dataset": "cifar10"} | kwargs))
        return ho2020._process(file, unet, channels)

    p, schedule = process(model_var_type="fixedsmall", model_mean_type="xstart", beta_end=0.01)
    assert (p.prediction, p.variance) == ("x0", "fixed_small")
    np.testing.assert_allclose(np.asarray(schedule.beta)[[1, 1000]], [1e-4, 0.01], rtol=1e-6)
    assert process(network.copy(channel_mult=(1, 1, 2, 2, 4, 4)))[0].variance == "fixed_small"
    assert process(network.copy(out_channels=6), model_var_type="learned")[0].variance == "learned"
    steps = {"num_diffusion_timesteps": 1000}
    for theirs, ours in {"quad": "quadratic", "const": "constant", "jsd": "harmonic"}.items():
        wanted = schedules.SCHEDULES[ours](1000).beta
        np.testing.assert_allclose(process(beta_schedule=theirs, **steps)[1].beta, wanted, err_msg=theirs)
    for theirs, fraction in {"warmup10": 0.1, "warmup50": 0.5}.items():
        wanted = schedules.warmup(1000, fraction=fraction).beta
        np.testing.assert_allclose(process(beta_schedule=theirs)[1].beta, wanted, err_msg=theirs)
    for kwargs, message in (
        ({"model_mean_type": "xprev"}, "model_mean_type='xprev' cannot be represented, only eps, xstart"),
        ({"model_var_type": "learned"}, "model_var_type='learned' needs a network of 6 output channels, not 3"),
        ({"beta_schedule": ["linear"]}, r"beta_schedule=\['linear'\] cannot be represented, only linear, quad"),
        ({"num_diffusion_timesteps": 10.0}, "num_diffusion_timesteps=10.0 must be a positive integer"),
        ({"block_size": 2}, "block_size=2 cannot be represented, only 1"),
    ):
        with pytest.raises(ValueError, match=f"kwargs.json: {message}"):
            process(**kwargs)


def test_the_prefix_is_found_by_each_of_its_files_and_the_newest_in_a_directory(tmp_path):
    assert ho2020.find(tmp_path) is None and ho2020.find(tmp_path / "model.ckpt-9") is None
    with pytest.raises(FileNotFoundError, match="PREFIX.index does not exist"):
        interop.load_ho2020(tmp_path)
    for name in ("model.ckpt-9", "model.ckpt-10"):
        (tmp_path / f"{name}.index").touch()
    nine = tmp_path / "model.ckpt-9"
    for suffix in ("", ".index", ".meta", ".data-00000-of-00001"):
        assert ho2020.find(f"{nine}{suffix}") == nine
    assert ho2020.find(tmp_path) == tmp_path / "model.ckpt-10"
