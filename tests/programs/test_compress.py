"""--mode=compress and --mode=decompress: the same pixels come back, with the same model only."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion.data import Source
from diffusion.experiment import build, workdir
from diffusion.programs import compress, decompress
from diffusion.runtime import coded_file
from diffusion.runtime.checkpoint import Checkpoints
from diffusion.runtime.preemption import Preempted, Preemption

pytestmark = pytest.mark.usefixtures("programs_compiled_once")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def images(tiny):
    return build.load_data(tiny(), "test").images(slice(20))


@pytest.fixture(scope="module")
def coded(tiny, straight, images, tmp_path_factory):
    """(the file, the folder that it is in), of 20 digits by the tiny run, whose last checkpoint is of step 6."""
    folder = tmp_path_factory.mktemp("coded")
    np.save(folder / "in.npy", images)
    compress.run(tiny(), straight, str(folder / "in.npy"), str(folder / "digits.ddc"))
    return folder / "digits.ddc"


def test_a_split_is_compressed_to_about_its_bound(tiny, straight, tmp_path, capsys):
    path = tmp_path / "test.ddc"
    compress.run(tiny(), straight, "test", str(path))
    said = json.loads(capsys.readouterr().out)
    header, words = coded_file.read(path)
    assert said["bound_bpd"] > 3  # it was hardly trained
    assert said["file_bytes"] == path.stat().st_size == pytest.approx(said["file_bpd"] * 299 * 64 / 8)
    num_params = json.loads((straight / "summary.json").read_text())["num_params"]
    assert said["weights_bytes"] == 4 * num_params  # the decoder needs them, and they are not in the file
    assert said["initial_bits"] == 32 * header.initial_words and said["images"] == header.num_images == 299
    assert abs(said["overhead_percent"]) < 3 and said["bound_protocol"] == "exact"
    net = (8 * path.stat().st_size - said["initial_bits"]) / (299 * 64)
    assert said["file_without_initial_bits_bpd"] == pytest.approx(net)
    assert path.stat().st_size - 4 * len(words) < 50  # the header


def test_it_is_compared_with_the_codec_s_own_bound_whatever_protocol_is_chosen(tiny, straight, images):
    """The other protocols have another decoder than what is coded."""
    _, model = compress.coding_model(tiny(), straight, "latest")
    source = Source("digits", "test", images, 17)
    own, other = (
        compress._bound(tiny(eval__protocol=protocol), model, source, Preemption()).image_bpd
        for protocol in ("exact", "nichol2021")
    )
    np.testing.assert_array_equal(other, own)


def test_a_signal_after_the_file_leaves_it_whole_and_the_report_without_the_bound(
    tiny, straight, images, tmp_path, capsys, monkeypatch
):
    def stopped(*_):
        raise Preempted("stopped by SIGTERM; the same command goes on")

    np.save(tmp_path / "in.npy", images)
    monkeypatch.setattr(compress, "_bound", stopped)
    with pytest.raises(Preempted) as stop:
        compress.run(tiny(), straight, str(tmp_path / "in.npy"), str(tmp_path / "out.ddc"))
    assert stop.value.reason.endswith("out.ddc is whole, and its bound was not computed")
    said = json.loads(capsys.readouterr().out)
    assert (said["bound_bpd"], said["overhead_percent"]) == (None, None) and said["file_bpd"] > 3
    assert coded_file.read(tmp_path / "out.ddc")[0].num_images == 20


def test_another_process_with_another_batch_size_gets_the_same_pixels(conditional, images, tmp_path):
    """By a U-Net with labels, which codes without them. Its parameters are drawn, so that none is 0."""
    made, run, rng = conditional(model__network="unet"), tmp_path / "run", np.random.default_rng(0)
    start = jax.device_get(build.experiment(made, (8, 8, 1), 17, 10).initial_state())
    drawn = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.02, leaf.shape).astype(np.float32), start.params)
    workdir.claim(made, run)
    with Checkpoints(run / "checkpoints") as checkpoints:
        checkpoints.save(6, start.replace(step=np.int32(6), ema_params=drawn), {"val_loss": 1.0})

    np.savez(tmp_path / "in.npz", images=images)
    compress.run(made, run, str(tmp_path / "in.npz"), str(tmp_path / "digits.ddc"))
    config = tmp_path / "config.py"
    plain = json.dumps(conditional(model__network="unet", compress__batch_size=5).to_json())
    config.write_text(
        "import json\nfrom diffusion.experiment import config as c\n"
        f"def get_config():\n    return c.from_json({plain})\n"
    )
    files = [f"--input={tmp_path / 'digits.ddc'}", f"--output={tmp_path / 'out.npz'}"]
    flags = [f"--config={config}", f"--workdir={run}", "--mode=decompress", *files]
    command = [sys.executable, str(ROOT / "main.py"), *flags]
    compiled = {"JAX_COMPILATION_CACHE_DIR": os.environ["DIFFUSION_TESTS_COMPILED"]}
    result = subprocess.run(command, cwd=ROOT, env=os.environ | compiled, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "20 images, equal to those that were compressed" in result.stdout
    with np.load(tmp_path / "out.npz") as decoded:
        np.testing.assert_array_equal(decoded["images"], images)
        assert decoded["images"].dtype == np.uint8 and decoded["num_levels"] == 17


def test_a_learned_schedule_with_the_decoder_by_bayes_rule_is_coded_to_about_its_bound(vdm, vdm_run, tmp_path, capsys):
    # β_t is the variance that fits a network that was hardly trained. Under one that does not fit, bits are not
    # uniform, and what later pops draw from them is not q.
    config = vdm(eval__variance="fixed_large")
    compress.run(config, vdm_run, "test", str(tmp_path / "test.ddc"))
    # As with the other decoder: the header, the groups' sizes, and chance in the code's paths and the bound's noise.
    assert abs(json.loads(capsys.readouterr().out)["overhead_percent"]) < 3
    decompress.run(config, vdm_run, str(tmp_path / "test.ddc"), str(tmp_path / "out.npz"))
    with np.load(tmp_path / "out.npz") as decoded:
        np.testing.assert_array_equal(decoded["images"], build.load_data(config, "test").images())
    experiment, model = compress.coding_model(config, vdm_run, "latest")
    assert np.all(model.schedule.log_snr[1:] != experiment.start_schedule.log_snr[1:])  # it is the learned one


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": b"abcd"}, "with other weights or another schedule .*: 61626364 there, [0-9a-f]{8} here"),
        ({"config": b"abcd"}, "with another model"),
        ({"floats": b"abcd"}, "where the network computes other floats"),
        ({"device": "TPU v5"}, "on another kind of device, whose floats differ: TPU v5 there, cpu here"),
        ({"jax_version": "0.1"}, "with another version of jax, .*: 0.1 there"),
        ({"height": 9}, "of images of another height: 9 there, 8 here"),
        ({"num_levels": 256}, "another number of pixel values"),
        ({"dtype": 1}, "with another dtype"),
        ({"pixels": b"abcd"}, "other images came out"),
        ({"initial_words": 1}, "these are not the bits of 20 images"),
    ],
)
def test_what_differs_is_named_and_nothing_is_written(changes, words, tiny, straight, coded, tmp_path):
    header, body = coded_file.read(coded)
    coded_file.write(tmp_path / "other.ddc", header.__class__(**vars(header) | changes), body)
    with pytest.raises(ValueError, match=words):
        decompress.run(tiny(), straight, str(tmp_path / "other.ddc"), str(tmp_path / "out.npz"))
    assert [path.name for path in tmp_path.iterdir()] == ["other.ddc"]


def test_another_checkpoint_and_another_variance_are_other_models(tiny, straight, coded, tmp_path):
    out = str(tmp_path / "out.npz")
    with pytest.raises(ValueError, match="with other weights"):
        decompress.run(tiny(), straight, str(coded), out, checkpoint="3")
    with pytest.raises(ValueError, match="with another model"):
        decompress.run(tiny(eval__variance="fixed_small"), straight, str(coded), out)
    assert not list(tmp_path.iterdir())


def test_a_flipped_bit_is_noticed(tiny, straight, coded, tmp_path):
    data, path = coded.read_bytes(), tmp_path / "flipped.ddc"
    for position in [*range(50), *range(50, len(data), 97), len(data) - 1]:
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="damaged"):
            decompress.run(tiny(), straight, str(path), str(tmp_path / "out.npz"))


def test_what_is_missing_or_in_the_way_is_said_first(tiny, conditional, straight, coded, tmp_path):
    (tmp_path / "there.npz").touch()
    for program in (compress, decompress):
        with pytest.raises(FileExistsError, match="there.npz exists"):
            program.run(tiny(), straight, str(coded), str(tmp_path / "there.npz"))
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            program.run(tiny(), straight, str(coded), str(tmp_path / "none" / "a.npz"))
        with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
            program.run(tiny(), tmp_path / "run", str(coded), str(tmp_path / "a.npz"))
    with pytest.raises(FileNotFoundError, match="--input=tset is no file or folder, and none of train, test, valid"):
        compress.run(tiny(), straight, "tset", str(tmp_path / "a.ddc"))
    with pytest.raises(ValueError, match="must end in .npz"):
        decompress.run(tiny(), straight, str(coded), str(tmp_path / "a.npy"))
    for no_file in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"^--input={no_file} is no file; it must be one that --mode=comp"):
            decompress.run(tiny(), straight, str(no_file), str(tmp_path / "a.npz"))
    assert [path.name for path in tmp_path.iterdir()] == ["there.npz"]


def test_a_split_without_images_is_refused_with_its_key(tiny):
    config = tiny(data__validation=0)
    with pytest.raises(ValueError, match="--input=validation: .* no images, because data.validation=0$"):
        compress._source(config, build.experiment(config, (8, 8, 1), 17), "validation")


def test_a_network_that_needs_labels_is_refused(labelled_run, conditional, tmp_path):
    config = conditional(model__label_dropout=0.0)
    run = shutil.copytree(labelled_run, tmp_path / "run")
    saved = json.loads((run / "config.json").read_text())
    saved["model"]["label_dropout"] = 0.0
    (run / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="the file has no labels, which this network needs"):
        compress.run(config, run, "test", str(tmp_path / "a"))
