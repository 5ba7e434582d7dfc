"""A run that version 0.1 began is scored, sampled and resumed by this version.

tests/golden/run_0.1.tar.xz holds `run`, a tiny U-Net on the digits with a learned schedule, stopped before its ninth
step of twelve; `expected.json`, version 0.1's results for it; and `test.ddc`, the test images that it compressed.
"""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from diffusion.experiment import config as config_lib
from diffusion.experiment import schema, workdir
from diffusion.programs import compress, evaluate, sample, train
from diffusion.reporting import metrics_log
from diffusion.runtime import coded_file

ARCHIVE = Path(__file__).parents[1] / "golden" / "run_0.1.tar.xz"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("older")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def run(unpacked, tmp_path):
    return shutil.copytree(unpacked / "run", tmp_path / "run")


@pytest.fixture(scope="module")
def expected(unpacked):
    return json.loads((unpacked / "expected.json").read_text())


@pytest.fixture
def config(run, tiny_data_dir):
    """What the command line says now, for data that lie elsewhere."""
    config = config_lib.completed(workdir.read_config(run))
    config.data.data_dir = tiny_data_dir
    return config


@pytest.mark.parametrize("step", ["3", "6"])
def test_it_is_scored_to_the_same_bits_per_dimension(step, run, config, expected):
    evaluate.run(config, run, step)
    found, then = json.loads((run / "eval.json").read_text()), expected["scores"][step]
    for name in ("test_bpd", "train_bpd", "prior_bpd"):
        np.testing.assert_allclose(found[name], then[name], atol=1e-6)
    assert found["ema_sha256"] == then["ema_sha256"]


def test_it_is_sampled_to_the_same_pictures(run, config, expected):
    sample.run(config, run)
    images, then = np.load(run / "samples.npz")["images"].astype(int), np.array(expected["samples"])
    assert np.abs(images - then).max() <= 1 and np.mean(images == then) > 0.98  # another compiler rounds otherwise


def test_it_goes_on_to_its_end(run, config, expected):
    before = metrics_log.read_metrics(run)
    config.sample.num_images = 0  # what is drawn of a checkpoint is compared above
    train.run(config, run)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["step"] == 12
    np.testing.assert_allclose(summary["test_bpd"], expected["end"]["test_bpd"], rtol=1e-3)
    rows = metrics_log.read_metrics(run)
    assert [row["step"] for row in rows] == [2, 3, 4, 6, 8, 9, 10, 12]
    assert rows[:4] == before[:4]
    np.testing.assert_allclose(rows[4]["loss"], before[4]["loss"], rtol=1e-3)  # the steps after the checkpoint, again


def test_without_keys_that_came_later_it_is_the_run_that_it_was(run, config, expected):
    groups = json.loads((run / "config.json").read_text())
    assert "version" not in groups
    del groups["model"]["conditioning"], groups["train"]["monitor_images"], groups["unet"]["scale_shift_norm"]
    (run / "config.json").write_text(json.dumps(groups))
    with pytest.raises(ValueError, match="train.monitor_images: 256 → 16"):  # now 16 is a change
        workdir.check(config, run)
    config.train.monitor_images = 256
    workdir.check(config, run)
    workdir.claim(config, run)
    assert config_lib.differing(workdir.read_config(run), config) == []
    assert json.loads((run / "config.json").read_text())["version"] != "0.1.0"


def test_a_key_that_a_config_file_sets_since_does_not_concern_it_unless_the_user_sets_it(run, config, caplog):
    config.data.validation = -1
    with pytest.raises(ValueError, match="data.validation: 0 → -1"):
        workdir.check(workdir.continued(config, run, chosen=["data.validation"]), run)
    for _ in range(2):  # also once config.json was written again
        caplog.clear()
        continued = workdir.continued(config, run)
        assert continued.data.validation == 0 and continued.unet == config.unet
        assert "began before the key data.validation existed and continues with data.validation=0" in caplog.text
        workdir.claim(continued, run)
    new = run.with_name("new")
    assert workdir.continued(config, new) == config
    workdir.claim(config, new)
    assert workdir.continued(config, new).data.validation == -1


def test_its_compressed_images_are_known_as_its_own(run, config, unpacked):
    header, _ = coded_file.read(unpacked / "test.ddc")
    config.schedule.name = "learned(start='cosine', inner='second_moment')"  # as it is spelled now
    found = compress.identity(*compress.coding_model(config, run, "latest"))
    of_the_model = found.keys() - {"device", "jax_version"}
    assert {name: found[name] for name in of_the_model} == {name: getattr(header, name) for name in of_the_model}


@pytest.mark.parametrize(("value", "is_same"), [(2, True), (3, False)])
def test_a_key_that_came_later_is_in_the_digest_of_a_file_only_where_it_changes_the_model(
    value, is_same, run, config, unpacked, monkeypatch
):
    monkeypatch.setitem(schema.KEYS, "model.later", schema.Key(3, schema.integer(0), "a key", before=2))
    with config.unlocked():
        config.model.later = value
    (run / "config.json").write_text(config_lib.to_json(config))
    found = compress.identity(*compress.coding_model(config, run, "latest"))
    assert (found["config"] == coded_file.read(unpacked / "test.ddc")[0].config) == is_same
