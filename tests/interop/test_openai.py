"""Checkpoints of improved-diffusion and guided-diffusion: the original code's numbers, the way back, and errors."""

import re
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import openai_cases
import pytest

from diffusion import guidance, interop, likelihood, process
from diffusion.interop import openai, openai_flags
from diffusion.networks.adm import ADM

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "openai.npz")
CASES = openai_cases.CASES
BLOCKS = CASES["blocks"]


class Tensor:
    """What is asked of PyTorch's."""

    def __init__(self, values, dtype="torch.float32"):
        self.values, self.dtype, self.shape = values, dtype, values.shape

    def __len__(self):
        return len(self.values)

    def detach(self):
        return self

    def float(self):
        return Tensor(self.values.astype(np.float32))

    def numpy(self):
        return self.values


def tensors_of(case):
    shapes = zip(GOLDEN[f"{case}/names"], GOLDEN[f"{case}/shapes"], strict=True)
    return openai_cases.weights({str(name): tuple(filter(None, shape.tolist())) for name, shape in shapes})


@pytest.fixture
def files(monkeypatch):
    """What files hold, by name: a PyTorch without files."""
    held = {f"{case}.pt": {k: Tensor(v) for k, v in tensors_of(case).items()} for case in CASES}

    def load(path, map_location, weights_only):
        assert weights_only and map_location == "cpu"
        return held[str(path)]

    def save(state, file):
        held["written"] = state

    fake = SimpleNamespace(load=load, save=save, from_numpy=Tensor)
    monkeypatch.setitem(sys.modules, "torch", fake)
    monkeypatch.setattr(openai, "_param_shapes", SHAPES)
    return held


SHAPES = cache(openai._param_shapes)  # traced once a network


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_terms_are_those_of_the_original_program(case, files):
    model = interop.load_openai(f"{case}.pt", CASES[case])
    x0, eps, labels = map(jnp.asarray, openai_cases.inputs(model.schedule.num_steps))
    assert model.takes_labels == (case == "blocks") and model.num_levels == 256
    t = np.arange(1, model.schedule.num_steps + 1).repeat(2)  # all t of both images are one batch
    labels, images = jnp.tile(labels, len(t) // 2), jnp.tile(x0, (len(t) // 2, 1, 1, 1))
    denoise = guidance.conditional(model.denoise, labels) if model.takes_labels else model.denoise

    @jax.jit
    def both(denoise, row, x0, eps):
        x_t = jax.vmap(process.q_sample)(row, x0, eps)
        output = denoise(x_t, row.network_t)
        decoder = likelihood.PROTOCOLS["nichol2021"].decoder
        term = jax.vmap(lambda *of: likelihood.vlb_term_bpd(model.p, *of, decoder=decoder))
        return output, term(row, x0, x_t, output)

    output, terms = both(denoise, model.schedule[t], images, eps.reshape(images.shape))
    wanted = GOLDEN[f"{case}/outputs"].reshape(output.shape)
    assert np.linalg.norm(output - wanted) < 5e-6 * np.linalg.norm(wanted)
    np.testing.assert_allclose(terms.reshape(-1, 2).T, GOLDEN[f"{case}/terms_bpd"], rtol=1e-5)
    prior = jax.vmap(lambda image: likelihood.prior_bpd(model.schedule, image))(x0)
    np.testing.assert_allclose(prior, GOLDEN[f"{case}/prior_bpd"], rtol=2e-4)  # theirs cancels in float32


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_what_was_read(case, files, tmp_path):
    adm, params = interop.load_adm(f"{case}.pt", CASES[case])
    flags = interop.save_openai(tmp_path / "again.pt", adm, params, 8, new_order=case == "blocks")
    assert files["written"].keys() == files[f"{case}.pt"].keys() and (tmp_path / "again.pt").is_file()
    for name, tensor in files[f"{case}.pt"].items():
        np.testing.assert_array_equal(files["written"][name].values, tensor.values, err_msg=name, strict=True)
    assert interop.load_adm("written", flags)[0] == adm


def test_a_network_that_the_layout_has_no_place_for_is_refused(files):
    adm, params = interop.load_adm("blocks.pt", BLOCKS)
    halves = {"channels": 64, "channel_mult": (0.5, 1)}
    for changes in ({"num_groups": 16}, {"norm_eps": 1e-6}, {"attention_resolutions": ()}, halves):
        name, value = list(changes.items())[-1]
        with pytest.raises(ValueError, match=rf"adm.{name}={re.escape(str(value))} has no place in guided-diffusion"):
            interop.save_openai("again.pt", adm.copy(**changes), params, 8)
    with pytest.raises(ValueError, match="up_1_block_1/.* is missing"):
        interop.save_openai("again.pt", adm, {k: v for k, v in params.items() if k != "up_1_block_1"}, 8)
    assert "written" not in files


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_channels": 64}, "blocks.pt: num_channels is 64 by the flags and 32 in the file$"),
        ({"num_res_blocks": "2"}, "blocks.pt: num_res_blocks is 2 by the flags and 1 in the file$"),
        ({"class_cond": False}, "blocks.pt: class_cond is False by the flags and True in the file$"),
        ({"learn_sigma": False}, "blocks.pt: learn_sigma is False by the flags and True in the file$"),
        ({"use_scale_shift_norm": "no"}, "blocks.pt: use_scale_shift_norm is False by the flags and True in the file$"),
        ({"resblock_updown": 0}, "blocks.pt: resblock_updown is False by the flags and True in the file$"),
        ({"attention_resolutions": "8,4"}, r"blocks.pt: attention_resolutions is \[8, 4\] by the flags and \[4\] in "),
        ({"channel_mult": "1,1"}, r"blocks.pt: channel_mult, as widths, is \[32, 32\] by the flags and \[32, 64\]"),
        ({"channel_mult": "1,1,1"}, "blocks.pt: channel_mult, as levels, is 3 by the flags and 2 in the file"),
        ({"colour": 1}, "guided_diffusion has no flag colour; it has .*image_size, "),
        ({"num_channels": "wide"}, "num_channels='wide' must be an integer"),
        ({"num_channels": 32.5}, "num_channels=32.5 must be an integer"),
        ({"learn_sigma": "maybe"}, "learn_sigma='maybe' must be True or False"),
        ({"dropout": "x"}, "dropout='x' must be a number"),
        ({"attention_resolutions": "16;8"}, "attention_resolutions='16;8' must be integers with commas"),
        ({"channel_mult": ""}, "image_size=8 must be one of 64, 128, 256, 512 or a channel_mult in guided_diffusion"),
        ({"noise_schedule": "sqrt"}, "noise_schedule='sqrt' must be linear or cosine"),
        ({"noise_schedule": "linear"}, r"noise_schedule='linear' with diffusion_steps=7: β must lie in \(0, 1\]"),
        ({"timestep_respacing": "ddim5"}, "timestep_respacing='ddim5' is impossible with diffusion_steps=7"),
        ({"timestep_respacing": "4,4"}, "timestep_respacing='4,4' is impossible with diffusion_steps=7"),
        ({"timestep_respacing": "fast"}, "timestep_respacing='fast' must be like 250, 10,20 or ddim25"),
        ({"package": "diffusers"}, "package='diffusers' must be improved_diffusion or guided_diffusion"),
        ({"num_channels": 48}, r"num_groups=32 must divide the width of every level, \[48, 96\]"),
        ({"num_head_channels": 24}, r"num_head_channels=24 must divide the width of every map with attention, \[64\]"),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_it(changes, message, files):
    with pytest.raises(ValueError, match=f"^{message}") as raised:
        interop.load_openai("blocks.pt", BLOCKS | changes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop("time_embed.0.weight"), "blocks.pt: time_embed.0.weight is missing"),
        (lambda held: held.pop("out.2.weight"), "blocks.pt: out.2.weight is missing"),
        (
            lambda held: held.pop("input_blocks.2.0.in_layers.0.weight"),
            "blocks.pt: input_blocks.2.0.in_layers.0.weight is missing$",
        ),
        (lambda held: held.clear(), "blocks.pt: input_blocks.0.0.bias is missing; "),
        (lambda held: held.update({"ema": held["out.0.bias"]}), "blocks.pt: ema is extra"),
        (lambda held: held.update({"out.0.bias": Tensor(np.full(32, np.nan))}), "blocks.pt: NaN or Inf in out.0.bias"),
        (
            lambda held: held.update({"out.0.bias": Tensor(np.zeros(32, np.int64), "torch.int64")}),
            "blocks.pt: not floats of 32 or 16 bits: out.0.bias is int64",
        ),
        (
            lambda held: held.update({7: held["out.0.bias"]}),
            "blocks.pt is not a PyTorch state_dict: it has no names",
        ),
        (
            lambda held: [held.update({f"module.{name}": held.pop(name)}) for name in list(held)],
            "blocks.pt: input_blocks.0.0.bias is missing; ",
        ),
        (
            lambda held: held.update({"out.0.bias": 3}),
            "blocks.pt is not a PyTorch state_dict: these are not tensors: out.0.bias$",
        ),
    ],
)
def test_a_damaged_file_is_one_line_that_names_what_is_wrong(change, message, files):
    change(files["blocks.pt"])
    with pytest.raises(ValueError, match=f"^{message}") as raised:
        interop.load_openai("blocks.pt", BLOCKS)
    assert "\n" not in str(raised.value)


def test_half_precision_is_converted_with_a_warning(files, caplog):
    held = files["blocks.pt"]
    half = held["out.2.weight"].values.astype(np.float16)
    held["out.2.weight"] = Tensor(half, "torch.float16")
    _, params = interop.load_adm("blocks.pt", BLOCKS | {"use_fp16": "True"})
    kernel = params["conv_out"]["kernel"]
    assert kernel.dtype == jnp.float32 and np.array_equal(kernel, half.astype(np.float32).transpose(2, 3, 1, 0))
    assert "blocks.pt holds weights in half precision (float16); converted to float32" in caplog.text


def test_without_pytorch_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RuntimeError, match=r"PyTorch is needed for blocks.pt: pip install -e '.\[openai\]'"):
        interop.load_openai("blocks.pt", BLOCKS)


def test_what_is_absent_is_the_program_s_default():
    improved = openai_flags.read({"package": "improved-diffusion"})
    guided = openai_flags.read({"package": "guided_diffusion"})
    assert improved["rescale_timesteps"] and not guided["rescale_timesteps"]
    for flags in (improved, guided):
        assert openai_flags.network(flags) == ADM(num_res_blocks=2, out_channels=3)
        p, schedule = openai_flags.process(flags), openai_flags.schedule(flags)
        assert (p.prediction, p.variance, schedule.num_steps) == ("eps", "fixed_large", 1000)
    small = openai_flags.read({"package": "improved_diffusion", "sigma_small": "true", "predict_xstart": "yes"})
    assert (openai_flags.process(small).prediction, openai_flags.process(small).variance) == ("x0", "fixed_small")


def test_the_program_is_recognized_where_the_flags_allow_it():
    assert openai_flags.read({"num_head_channels": 64})["package"] == "guided_diffusion"
    assert openai_flags.read({"rescale_timesteps": True})["package"] == "improved_diffusion"
    with pytest.raises(ValueError, match="the flags fit two packages .*: add package='improved_diffusion' or "):
        openai_flags.read({"image_size": 64})
    # Both trainings have this flag, and their defaults of rescale_timesteps differ.
    with pytest.raises(ValueError, match="the flags fit two packages"):
        openai_flags.read({"image_size": 64, "diffusion_steps": 4000, "use_fp16": True})
    decided = openai_flags.read({"use_fp16": True, "rescale_timesteps": False})
    assert decided["package"] == "guided_diffusion" and not decided["rescale_timesteps"]


def test_rescaled_and_respaced_the_network_is_told_the_t_of_1000_steps():
    flags = {"package": "improved_diffusion", "diffusion_steps": 4000, "timestep_respacing": "ddim40"}
    schedule = openai_flags.schedule(openai_flags.read(flags))
    np.testing.assert_allclose(schedule.network_t[1:], np.arange(40) * 100 / 4, rtol=1e-6)


@pytest.mark.parametrize(
    ("num_steps", "text", "kept"),
    [
        # space_timesteps of guided-diffusion, plus one: its t begins at 0.
        (10, "5", [1, 3, 5, 8, 10]),  # 2.25 and 6.75 and a half that is rounded to even
        (100, "4,2,1", [1, 12, 23, 34, 35, 67, 68]),
        (10, "ddim5", [1, 3, 5, 7, 9]),
        (10, "ddim4", [1, 4, 7, 10]),
        (7, "7", [1, 2, 3, 4, 5, 6, 7]),
        (6, "2,0,1", [1, 2, 5]),
    ],
)
def test_respacing_keeps_what_the_original_program_keeps(num_steps, text, kept):
    assert openai_flags.respacing(num_steps, text) == kept


def test_pytorch_itself_reads_and_writes(tmp_path):
    torch = pytest.importorskip("torch")
    path, tensors = tmp_path / "blocks.pt", tensors_of("blocks")
    torch.save({name: torch.tensor(tensor) for name, tensor in tensors.items()}, path)
    adm, params = interop.load_adm(path, BLOCKS)
    interop.save_openai(tmp_path / "again.pt", adm, params, 8, new_order=True)
    for name, tensor in torch.load(tmp_path / "again.pt", weights_only=True).items():
        np.testing.assert_array_equal(tensor.numpy(), tensors[name], err_msg=name, strict=True)
