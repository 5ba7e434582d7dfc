"""Checkpoints of google-research/vdm: the original code's three losses, errors, and finding the file."""

import re
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vdm_cases
from flax import serialization
from flax.traverse_util import unflatten_dict

from diffusion import continuous_time, interop, likelihood, parameterizations, process
from diffusion.data.levels import to_unit
from diffusion.interop import vdm

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "vdm.npz")
CASES = vdm_cases.CASES
GIVEN = {name: jnp.asarray(array) for name, array in vdm_cases.inputs().items()}
RESULTS = ("recon", "klz", "gamma_of_tenths", "diff_10", "diff_1000", "diff_inf", "z", "eps_hat")
NATS = GIVEN["images"][0].size * np.log(2)  # of one bit/dim


@cache
def tensors_of(case):
    shapes = zip(GOLDEN[f"{case}/names"], GOLDEN[f"{case}/shapes"], strict=True)
    return vdm_cases.weights({str(name): tuple(filter(None, shape.tolist())) for name, shape in shapes})


@pytest.fixture(autouse=True)
def shapes_are_traced_once(monkeypatch):
    monkeypatch.setattr(vdm, "_param_shapes", SHAPES)


SHAPES = cache(vdm._param_shapes)


def write(path, tensors, **others):
    """A checkpoint of the program, of a train state with these EMA parameters."""
    state = {"step": 7, "ema_params": unflatten_dict(tensors, sep="/")} | others
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(serialization.msgpack_serialize(state))


@pytest.fixture
def written(tmp_path):
    """A function of a case, and of tensors to change or leave out (None), that returns the directory."""

    def written(case, **changes):
        tensors = {name: leaf for name, leaf in (tensors_of(case) | changes).items() if leaf is not None}
        write(tmp_path / "ckpt-1.flax", tensors, params={}, opt_state={})
        return tmp_path

    return written


# The network's program serves both kinds of rows.
denoise = jax.jit(lambda model, x_t, network_t: model.denoise(x_t, network_t))
noised = jax.jit(lambda rows, x0: jax.vmap(process.q_sample)(rows, x0, GIVEN["eps"]))


@jax.jit
def losses(model, rows, x0, x_t, output):
    """VDM's loss per step, or per unit of t, of each image in nats."""
    nats = jax.vmap(partial(parameterizations.weighted_error, model.p))(rows, x0, x_t, GIVEN["eps"], output)
    return nats.sum(axis=(1, 2, 3))


@jax.jit
def ends(schedule, x0):
    """L_0 and L_T of each image in bits/dim."""
    recon = jax.vmap(lambda image, eps: likelihood.bayes_decoder_bpd(schedule[1], image, eps))(x0, GIVEN["eps_0"])
    return recon, jax.vmap(lambda image: likelihood.prior_bpd(schedule, image))(x0)


@pytest.mark.parametrize("case", CASES)
def test_the_losses_of_each_image_are_those_of_the_original_program(case, written):
    model = interop.load_vdm(written(case))
    ten = interop.load_vdm(written(case), {"sm_n_timesteps": 10}).schedule
    x0, t, golden = to_unit(GIVEN["images"], 256), GIVEN["t"], {name: GOLDEN[f"{case}/{name}"] for name in RESULTS}

    for found, name in zip(ends(model.schedule, x0), ("recon", "klz"), strict=True):
        # In bits/dim. Of recon either program rounds off up to 2e-5 of its own value.
        np.testing.assert_allclose(found, golden[name] / NATS, rtol=1e-5, atol=5e-6, err_msg=name)
    np.testing.assert_allclose(2 * np.log(255 / 256) - ten.log_snr[1:], golden["gamma_of_tenths"], rtol=1e-5)

    # The difference of two γ in float32, which their program takes, has an error of 1e-6, and a step of 1000 is 0.018.
    for schedule, rtol in ((ten, 1e-5), (model.schedule, 1e-4)):
        num_steps = schedule.num_steps - 1
        rows = schedule[1 + np.ceil(t * num_steps).astype(int)]
        x_t = noised(rows, x0)
        nats = num_steps * losses(model, rows, x0, x_t, denoise(model, x_t, rows.network_t))
        np.testing.assert_allclose(nats, golden[f"diff_{num_steps}"], rtol=rtol)

    # Between its knots the schedule of the γ that is a network is straight, so its slope is another there.
    instants = jax.jit(continuous_time.at)(model.schedule, 1 + 1000 * t)
    x_t = noised(instants, x0)
    bent = case == "nnet"
    np.testing.assert_allclose(x_t, golden["z"], atol=1e-5 if bent else 2e-6)
    nats = 1000 * losses(model, instants, x0, x_t, denoise(model, x_t, instants.network_t))
    np.testing.assert_allclose(nats, golden["diff_inf"], rtol=1e-3 if bent else 1e-5)
    # Of the same z: the Fourier features enlarge its last digit 800 times.
    eps_hat = denoise(model, jnp.asarray(golden["z"]), instants.network_t)
    np.testing.assert_allclose(eps_hat, golden["eps_hat"], atol=2e-5)


BIAS, KERNEL = "score_model/conv_in/bias", "score_model/conv_in/kernel"
BLOCK, EXTRA = "score_model/up.block_2/conv1/bias", "score_model/up.block_3/conv1/bias"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({BIAS: None}, f"{BIAS} is missing"),
        ({KERNEL: None}, f"{KERNEL} is missing"),
        ({BLOCK: None, EXTRA: np.zeros(32, np.float32)}, f"{BLOCK} is missing; {EXTRA} is extra"),
        ({BIAS: np.zeros(31, np.float32)}, rf"{BIAS} is \(31,\) instead of \(32,\)"),
        ({KERNEL: np.zeros((3, 3, 9, 32), np.float32)}, rf"{KERNEL} is \(3, 3, 9, 32\) instead of \(3, 3, 15, 32\)"),
        ({BIAS: np.zeros(32)}, f"not float32: {BIAS} is float64"),
        ({BIAS: np.full(32, np.nan, np.float32)}, f"NaN or Inf in {BIAS}"),
        ({"gamma/w": None}, "gamma/w is missing"),
        ({"gamma/w": np.zeros(1, np.float32)}, "γ does not increase"),
    ],
)
def test_a_file_of_something_else_is_refused_in_a_line_that_names_it(changes, message, written):
    directory = written("scalar", **changes)
    with pytest.raises(ValueError, match=f"^{re.escape(str(directory / 'ckpt-1.flax'))}: [^\n]*{message}[^\n]*$"):
        interop.load_vdm(directory)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sm_n_layers": 2}, "sm_n_layers is not a key of VDM's config.model"),
        ({"sm_n_layer": 3, "sm_pdrop": 0.1}, "sm_n_layer is 3 by the config and 2 in the file"),
        ({"gamma_type": "fixed"}, "gamma_type is fixed by the config and learnable_scalar in the file"),
        ({"gamma_min": 6}, "gamma_min=6 must be below gamma_max=5.0"),
        ({"gamma_max": "5"}, "gamma_max='5' must be a number"),
        ({"sm_n_timesteps": -1}, "sm_n_timesteps=-1 must be at least 0"),
        ({"vocab_size": 256.0}, "vocab_size=256.0 must be an integer"),
    ],
)
def test_a_config_that_is_wrong_is_refused(config, message, written):
    with pytest.raises(ValueError, match=re.escape(message)):
        interop.load_vdm(written("scalar"), config)


def test_what_is_no_checkpoint_is_refused(written, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint of VDM's program, ckpt-N.flax"):
        interop.load_vdm(tmp_path / "nothing")
    path = written("scalar") / "ckpt-1.flax"
    whole = path.read_bytes()
    for held in (whole[:100_000], b"\x80\x04}", b""):
        path.write_bytes(held)
        with pytest.raises(ValueError, match="ckpt-1.flax: (it is damaged|ema_params is missing; the file holds int)"):
            interop.load_vdm(tmp_path)
    path.write_bytes(serialization.msgpack_serialize({"params": {}, "step": 1}))
    with pytest.raises(ValueError, match="ema_params is missing; the file holds params; step"):
        interop.load_vdm(tmp_path)


def test_a_file_that_is_cut_anywhere_is_one_line(tmp_path):
    path = tmp_path / "ckpt-1.flax"
    whole = serialization.msgpack_serialize({"ema_params": {"a": {"b": np.ones((2, 3), np.float32)}}, "step": 3})
    path.write_bytes(whole)
    assert vdm._tensors(path).keys() == {"a/b"}
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"^it is damaged, or not a msgpack of Flax \(\w+\)$"):
            vdm._tensors(path)


def test_the_newest_file_is_read_also_inside_the_folder_that_clu_makes(tmp_path):
    for name in ("checkpoints-0/ckpt-9.flax", "checkpoints-0/ckpt-10.flax", "checkpoints-0/ckpt-10.index"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert vdm.find(tmp_path) == vdm.find(tmp_path / "checkpoints-0") == tmp_path / "checkpoints-0" / "ckpt-10.flax"
    (tmp_path / "checkpoint_7").touch()
    assert vdm.find(tmp_path).name == "checkpoint_7"
    older = tmp_path / "checkpoints-0" / "ckpt-9.flax"
    assert vdm.find(older) == older and vdm.newest(older.with_name("ckpt-10.index")) is None


def test_config_json_is_read_beside_the_files_or_where_their_folder_lies(written, tmp_path):
    folder = written("scalar") / "checkpoints-0"
    folder.mkdir()
    (tmp_path / "ckpt-1.flax").rename(folder / "ckpt-1.flax")
    (tmp_path / "config.json").write_text('{"model": {"sm_n_timesteps": 4}}')
    for given in (tmp_path, folder, folder / "ckpt-1.flax"):
        assert interop.load_vdm(given).schedule.num_steps == 5
    (folder / "config.json").write_text('{"model": {"sm_n_timesteps": 6}}')
    assert interop.load_vdm(tmp_path).schedule.num_steps == 7


def test_a_fixed_curve_is_the_config_s_and_config_json_is_read(written):
    directory = written("scalar", **{"gamma/w": None, "gamma/b": None})
    (directory / "config.json").write_text('{"model": {"gamma_min": -9.0, "sm_n_timesteps": 4, "vocab_size": 16}}')
    model = interop.load_vdm(directory, {"gamma_max": 3.0})
    gamma = np.linspace(-9, 3, 5)
    np.testing.assert_allclose(model.schedule.log_snr[1:], 2 * np.log(15 / 16) - gamma, rtol=1e-6)
    np.testing.assert_allclose(model.schedule.network_t[1:], [0, 250, 500, 750, 1000], atol=1e-3)
    assert model.num_levels == 16 and (model.p.prediction, model.p.variance, model.p.decoder) == (
        "eps", "fixed_small", "bayes",
    )  # fmt: skip
