"""Published checkpoints: each name has its flags, and the table compares published and measured numbers."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import data, interop, reverse, schedules
from diffusion.evaluation import bound
from diffusion.evaluation.pairs import ImagePairs
from diffusion.interop import openai_flags, vdm
from diffusion.model import Model
from diffusion.networks.adm import ADM
from diffusion.networks.network import Network
from diffusion.networks.unet import UNet
from diffusion.runtime.preemption import Preempted
from experiments import published, published_rows
from experiments.published_rows import ROWS, Row, by_name, flags_of

NETWORKS = {
    "cifar10_uncond_vlb_50M_500K": ADM(channel_mult=(1, 2, 2, 2), dropout=0.3),
    "imagenet64_uncond_100M_1500K": ADM(),
    "imagenet64_cond_270M_250K": ADM(channels=192, num_classes=1000),
    "lsun_uncond_100M_2400K_bs64": ADM(
        channel_mult=(1, 1, 2, 2, 4, 4),
        num_res_blocks=2,
        num_heads=1,
        scale_shift_norm=False,
        attention_resolutions=(16,),
    ),
    "512x512_diffusion": ADM(
        channels=256,
        channel_mult=(0.5, 1, 1, 2, 2, 4, 4),
        num_res_blocks=2,
        attention_resolutions=(32, 16, 8),
        head_channels=64,
        block_resampling=True,
        num_classes=1000,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_published_flags_make_the_published_networks(name):
    flags = openai_flags.read(by_name(name).flags)
    assert openai_flags.network(flags) == NETWORKS[name]
    assert openai_flags.process(flags).variance == "learned_range"
    assert flags["rescale_timesteps"] == (name.startswith(("cifar10", "imagenet64_uncond")))


def test_every_row_can_be_read_and_each_name_is_one_row_s():
    names = [name for row in ROWS for name in row.names]
    assert len(set(names)) == len(names) == 16
    for row in ROWS:
        flags = openai_flags.read(row.flags)
        openai_flags.network(flags)
        assert published_rows.agrees(row, flags) and (row.test_bpd is None) == (row.source == "")
    assert {row.test_bpd for row in ROWS} == {3.17, 2.94, 3.57, 3.53, None}


def test_a_file_is_recognized_by_its_name_or_by_the_flags_beside_it(tmp_path):
    known = tmp_path / "cifar10_uncond_50M_500K.pt"
    flags, row = published.recognized(known, "")
    assert row.test_bpd == 3.17 and flags["diffusion_steps"] == 4000
    (tmp_path / "mine.json").write_text('{"package": "improved_diffusion", "num_heads": 2}')
    for arguments in ((tmp_path / "mine.pt", ""), (tmp_path / "other.pt", str(tmp_path / "mine.json"))):
        flags, row = published.recognized(*arguments)
        assert row is None and flags["num_heads"] == 2
    (tmp_path / "mine.txt").write_text('{"package": "improved_diffusion", "num_heads": 3}')
    assert published.recognized(tmp_path / "other.pt", str(tmp_path / "mine.txt"))[0]["num_heads"] == 3
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="list.json: it must hold a JSON object of names and values"):
        published.recognized(tmp_path / "other.pt", str(tmp_path / "list.json"))
    with pytest.raises(FileNotFoundError, match="other.json does not exist; it must hold the flags that "):
        published.recognized(tmp_path / "other.pt", "")
    with pytest.raises(ValueError, match="has a published name, but not the published flags"):
        published.recognized(known, str(tmp_path / "mine.json"))
    # On fewer steps it has another bound, which is not the paper's.
    flags = by_name(known.stem).flags | {"timestep_respacing": "250"}
    known.with_suffix(".json").write_text(json.dumps(flags))
    with pytest.raises(ValueError, match="has a published name, but not the published flags"):
        published.recognized(known, "")


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A function of arguments: the program on eight images and a network of no layer, and what it leaves."""
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), np.uint8)
    monkeypatch.setattr(data, "load", lambda name, split, data_dir: data.Source(name, split, images))
    row = Row(
        ("toy",), flags_of("guided_diffusion", "--image_size 4 --channel_mult 1"), "noise", 7.25, "A paper, table 9"
    )
    monkeypatch.setattr(published_rows, "ROWS", [row])
    calls = []

    def denoise(x_t, network_t):
        calls.append(len(x_t))
        return 0.1 * x_t

    model = Model(denoise, reverse.make("eps", "fixed_large"), schedules.cosine(5))
    monkeypatch.setattr(interop, "load_openai", lambda path, flags: model)

    (tmp_path / "toy.pt").touch()

    def run(*arguments):
        calls.clear()
        workdir = tmp_path / "new" / "run"
        published.main([str(tmp_path / "toy.pt"), f"--workdir={workdir}", "--batch_size=40", *arguments])
        return json.loads((workdir / "published.json").read_text()), len(calls)

    return run


def test_both_numbers_are_printed_with_their_errors_and_finished_terms_are_not_computed_again(toy, capsys):
    estimate, _ = toy("--terms=3")
    capsys.readouterr()
    full, calls = toy("--full")
    assert len(full["params_sha256"]) == 64 and full["params_sha256"] == estimate["params_sha256"]
    assert calls and full["paper_bpd"] == 7.25 and full["test_images"] == 8 and full["protocol"] == "nichol2021"
    assert full["decoder_cdf"].startswith("tanh") and full["terms"] == "every term"
    printed = capsys.readouterr().out
    assert f"| here | {full['test_bpd']:.4f} ± {full['test_bpd_stderr']:.4f} | – | noise, 8 of 8 test images" in printed
    assert "| the paper | 7.25 | – | A paper, table 9 |" in printed
    again, calls = toy("--full")
    assert calls == 0 and again["test_bpd"] == full["test_bpd"]
    assert estimate["terms"] == "3 terms per image" and estimate["test_bpd_sampling_stderr"] > 0
    assert abs(estimate["test_bpd"] - full["test_bpd"]) < 5 * estimate["test_bpd_sampling_stderr"]
    other, _ = toy("--data=own")
    assert other["paper_bpd"] is None and "it has no bits/dim for these weights and images" in capsys.readouterr().out


@pytest.fixture
def batches(monkeypatch):
    """A record of measured batches; `batches.signal_at = n` sends SIGTERM once the n-th is there, before it is kept."""
    measure = ImagePairs.some

    def some(self, *arguments):
        for found in measure(self, *arguments):
            record.count += 1
            if record.count == record.signal_at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield found

    record = SimpleNamespace(count=0, signal_at=0)
    monkeypatch.setattr(ImagePairs, "some", some)
    return record


def test_an_estimate_that_a_signal_stops_goes_on_where_it_was(toy, batches, tmp_path):
    small = "--batch_size=16"  # 3 batches of the pilot, and 5 behind it
    straight, _ = toy(small)
    assert batches.count == 8
    shutil.rmtree(tmp_path / "new")
    batches.count, batches.signal_at = 0, 5
    with pytest.raises(Preempted) as stop:
        toy(small)
    assert stop.value.code == 75 and stop.value.reason == "stopped by SIGTERM; the same command goes on"
    batches.count, batches.signal_at = 0, 0
    assert toy(small)[0] == straight
    assert batches.count == 4  # the one that was measured and not kept yet, and the others


@pytest.fixture
def estimates(monkeypatch):
    """The images and the place of each estimate; nothing is computed."""
    made = []

    def estimated_bound(settings):
        def estimate(model, source, numbers, kept):
            made.append((numbers.tolist(), kept))
            return bound.Bound(*np.ones((4, len(numbers))))

        return estimate

    monkeypatch.setattr(bound, "estimated_bound", estimated_bound)
    return made


def test_each_estimate_has_finished_terms_of_its_own(toy, estimates):
    for other in ("--seed=0", "--seed=1", "--terms=7", "--protocol=exact", "--num_images=4"):
        toy(other)
    toy("--seed=0")
    paths = [kept for _, kept in estimates]
    assert len(set(paths)) == 5 and paths[-1] == paths[0]


def test_of_the_whole_test_split_a_protocol_drops_the_last_images_as_in_a_run(toy, estimates, monkeypatch):
    many = np.zeros((300, 4, 4, 3), np.uint8)
    monkeypatch.setattr(data, "load", lambda name, split, data_dir: data.Source(name, split, many))
    for flags in (["--protocol=ho2020"], ["--protocol=ho2020", "--num_images=256"], ["--protocol=exact"]):
        toy(*flags)
    whole, some, every = (numbers for numbers, _ in estimates)
    assert whole == list(range(256)) and every == list(range(300))
    assert len(some) == 256 and some != whole


def test_what_does_not_fit_is_refused(toy, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="--terms=4 must be an odd number ≥ 3"):
        toy("--terms=4")
    for wrong in ("--num_images=-1", "--batch_size=0", "--seed=-1", "--seed=99999999999"):
        with pytest.raises(ValueError, match=rf"{wrong} must be an integer in \d…2³¹ − 1"):
            toy(wrong)
    with pytest.raises(FileNotFoundError, match="gone.pt does not exist"):
        published.main([str(tmp_path / "gone.pt")])
    with pytest.raises(FileNotFoundError, match=r"holds none of ckpt-N.flax, PREFIX.index and scheduler_config.json"):
        published.main([str(tmp_path)])
    wide = np.zeros((8, 4, 8, 3), np.uint8)
    monkeypatch.setattr(data, "load", lambda name, split, data_dir: data.Source(name, split, wide))
    with pytest.raises(ValueError, match=r"'noise' has images \(4, 8, 3\); the model takes \(4, 4, 3\)"):
        toy()
    (tmp_path / "own.pt").touch()
    (tmp_path / "own.json").write_text('{"package": "guided_diffusion", "image_size": 4, "channel_mult": "1"}')
    with pytest.raises(ValueError, match="own.pt: no data set is known for it; choose .* --data=NAME"):
        published.main([str(tmp_path / "own.pt")])


def test_labels_that_the_model_does_not_know_are_refused():
    images, labels = np.zeros((8, 4, 4, 3), np.uint8), np.arange(8, dtype=np.int32)
    denoise = jax.tree_util.Partial(Network(ADM(num_classes=1000), 6), {})
    model = Model(denoise, reverse.make("eps", "learned_range"), schedules.cosine(5), takes_labels=True)
    given = published.Checkpoint(model, (4, 4, 3), {}, None)
    with pytest.raises(ValueError, match="data.name='noise' has no labels"):
        published.check(given, data.Source("noise", "test", images))
    with pytest.raises(ValueError, match="data.name='noise' has 8 classes; the model has 1000"):
        published.check(given, data.Source("noise", "test", images, classes=labels, num_classes=8))


def test_the_bits_of_an_image_whose_label_is_given_say_so(tmp_path):
    images, labels = np.zeros((3, 4, 4, 3), np.uint8), np.arange(3, dtype=np.int32)
    test_set = data.Source("noise", "test", images, classes=labels, num_classes=3)

    def denoise(x_t, network_t, labels):
        return jnp.concatenate([0.1 * x_t, x_t], axis=-1) + labels.astype(jnp.float32)[:, None, None, None]

    model = Model(denoise, reverse.make("eps", "learned_range"), schedules.cosine(5), takes_labels=True)
    found = published.score(model, test_set, bound.Settings(0, 8, "exact", 0), 0, tmp_path)
    assert found["labels"] == "given" and found["label_bpd"] == pytest.approx(np.log2(3) / 48)
    assert found["test_with_label_bpd"] == pytest.approx(found["test_bpd"] + np.log2(3) / 48)
    table = published.markdown(found | {"weights": "a", "data": "noise", "paper_bpd": None, "source": ""})
    assert "labels given (a label costs 0.0330)" in table


def test_ho_et_al_s_network_is_recognized_whatever_its_weights():
    def model(network, variance="fixed_large", schedule=schedules.linear(1000)):  # noqa: B008
        return Model(jax.tree_util.Partial(Network(network, 3), {}), reverse.make("eps", variance), schedule)

    assert published_rows.is_ho2020(model(UNet(dropout=0.0)))
    others = (UNet(channels=64), UNet(num_heads=2))
    assert not any(published_rows.is_ho2020(model(network)) for network in others)
    assert not published_rows.is_ho2020(model(UNet(), "fixed_small"))
    assert not published_rows.is_ho2020(model(UNet(), schedule=schedules.cosine(1000)))
    assert published_rows.HO2020.test_bpd == 3.75 and published_rows.HO2020.protocol == "ho2020"


def test_a_checkpoint_of_ho_et_al_s_program_is_recognized_by_its_prefix_or_directory(monkeypatch, tmp_path):
    params = {"conv_in": {"kernel": np.zeros((3, 3, 3, 128))}, "down_1_attention_0": {}}
    denoise = jax.tree_util.Partial(Network(UNet(), 3), params)
    model = Model(denoise, reverse.make("eps", "fixed_large"), schedules.linear(1000))
    monkeypatch.setattr(interop, "load_ho2020", lambda path: model)
    (tmp_path / "model.ckpt-790000.index").touch()
    for weights in (tmp_path, tmp_path / "model.ckpt-790000", tmp_path / "model.ckpt-790000.index"):
        given = published.found_at(weights, "")
        assert given.row is published_rows.HO2020 and given.image_shape == (32, 32, 3) and given.model is model
        with pytest.raises(ValueError, match=r"--flags=own.json is not used here: .* has its settings in its own"):
            published.found_at(weights, "own.json")
    (tmp_path / "ckpt-3.flax").touch()  # beside clu's own index
    with pytest.raises(ValueError, match="ckpt-3.flax"):
        published.found_at(tmp_path, "")


def test_a_directory_is_a_pipeline_of_diffusers(tmp_path):
    golden = Path(__file__).parents[1] / "golden"
    shutil.copyfile(golden / "unet_tiny.json", tmp_path / "config.json")
    shutil.copyfile(golden / "unet_tiny.safetensors", tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "scheduler_config.json").write_text('{"_class_name": "DDPMScheduler"}')
    given = published.pipeline(tmp_path)
    assert given.row is None and given.image_shape == (16, 16, 3) and given.model.schedule.num_steps == 1000


def test_a_vdm_is_recognized_and_scored_for_both_numbers_of_steps(monkeypatch, tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), np.uint8)
    monkeypatch.setattr(data, "load", lambda name, split, data_dir: data.Source(name, split, images))
    schedule = schedules.from_gamma(np.linspace(-9, 5, 6), np.linspace(0, 1000, 6), 255 / 256)
    denoise = jax.tree_util.Partial(Network(UNet(), 3), {})
    model = Model(denoise, reverse.make("eps", "fixed_small", "bayes"), schedule)
    told = dict(zip(published_rows.VDM_KEYS, (128, 32, "learnable_scalar", False), strict=True))
    monkeypatch.setattr(vdm, "loaded", lambda path, config: (model, told))
    finite = bound.Bound(*np.arange(12.0).reshape(4, 3))

    def limit(settings):
        def at_limit(model, source, numbers, other, kept):
            assert (model.host().schedule.num_steps, len(numbers), other) == (1001, 8, finite)
            paths.append(kept)
            return dataclasses.replace(finite, kl_bpd=finite.kl_bpd - 2, sampling_stderr=0.25)

        return at_limit

    def estimated_bound(settings):
        return lambda model, source, numbers, kept: paths.append(kept) or finite

    paths = []
    monkeypatch.setattr(bound, "estimated_bound", estimated_bound)
    monkeypatch.setattr(published, "limit", limit)
    (tmp_path / "ckpt-3.flax").touch()
    published.main([str(tmp_path), f"--workdir={tmp_path}"])
    found = json.loads((tmp_path / "published.json").read_text())
    assert (found["paper_bpd"], found["protocol"], found["num_steps"]) == (2.65, "vdm2021", 1001)
    assert not found["x0_clipped"] and found["config"] == told
    assert paths[1] == paths[0].with_stem(f"{paths[0].stem}_limit")  # of the same estimate, for T = ∞
    printed = capsys.readouterr().out
    assert "| the paper | 2.65 | – | Kingma et al. (2021), their program: 2.637 |" in printed
    assert f"| here, T = ∞ | {found['test_bpd'] - 2:.4f} ± " in printed and "| 0.2500 | cifar10, 8 of 8 te" in printed
    assert f"| here, T = 1000 | {found['test_bpd']:.4f} ± " in printed


def test_each_published_vdm_has_its_row():
    assert {row.test_bpd for row in published_rows.VDM.values()} == {2.65, 2.49, 3.72, 3.40}
    assert {row.protocol for row in published_rows.VDM.values()} == {"vdm2021"}
