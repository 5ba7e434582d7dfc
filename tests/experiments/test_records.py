"""The records: one config file each, equal arithmetic, choices by validation images."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from diffusion.data.source import Source, Splits
from diffusion.experiment import config as config_lib
from diffusion.reporting import summary
from experiments import records, records_report
from experiments.records_report import Entry


def test_a_record_comes_after_what_it_starts_from():
    names = records.names()
    assert sorted(names) == sorted(path.stem for path in (records.ROOT / records.FOLDER).glob("*.py"))
    for place, name in enumerate(names):
        start = records.starts_from(name)
        assert start in names[:place] or (records.ROOT / start).exists()


@pytest.mark.parametrize("name", records.names())
def test_a_record_is_a_config_whose_header_says_its_idea(name):
    config_lib.check(config_lib.from_file(records.file(name), {}))
    assert records._header(name, "Idea")


def test_records_with_the_same_weights_differ_in_a_fixed_variance_alone(monkeypatch):
    monkeypatch.setattr(records, "flops_per_image", lambda name: 2.4e9)
    pair = ["simple_fixed_small", "simple_fixed_large"]
    small, large = (config_lib.from_file(records.file(name), {}) for name in pair)
    assert (small.model.variance, large.model.variance) == ("fixed_small", "fixed_large")
    small.model.variance = "fixed_large"
    assert small == large
    (cell,) = records.cells(pair, 8, ["0"], {})
    assert cell.name == records.folder("simple_fixed_large", 8, "0") and cell.base == records.file("simple_fixed_large")


def test_a_budget_is_an_amount_of_arithmetic(monkeypatch):
    """Half the work per image, twice the steps; the budgets are in proportion to their minutes."""
    cost = {"hybrid": 2.4e9, "vlb": 1.2e9}
    monkeypatch.setattr(records, "flops_per_image", cost.get)
    assert records.num_steps("hybrid", 8) == int(records.BUDGETS[8] / 2.4e9 / 32) == 638
    assert abs(records.num_steps("vlb", 8) - 2 * 638) <= 1
    for (minutes, budget), (others, other) in itertools.pairwise(records.BUDGETS.items()):
        assert budget / minutes == pytest.approx(other / others, rel=0.01)


def test_training_scores_no_test_image_and_sets_validation_images_aside(monkeypatch):
    monkeypatch.setattr(records, "flops_per_image", lambda name: 2.4e9)
    for cell in records.cells(["vlb"], 8, ["0", "1"], {"data.data_dir": "somewhere"}):
        config = cell.config()
        assert config.eval.num_images == -1 and config.data.validation == 2000
        assert config.train.num_steps == config.train.checkpoint_every == 638
        assert config.data.data_dir == "somewhere"


def test_a_list_counts_no_arithmetic_and_names_the_runs_in_their_order(monkeypatch, capsys):
    monkeypatch.setattr(records, "flops_per_image", None)
    assert records.main(["--workdir=none", "--records=vlb,simple_fixed_small", "--seeds=2", "--list"]) == 0
    listed = capsys.readouterr().out.split()[1::2]
    monkeypatch.setattr(records, "flops_per_image", lambda name: 2.4e9)
    assert listed == [cell.name for cell in records.cells(["vlb", "simple_fixed_small"], 8, ["0", "1"], {})]


def test_one_line_says_that_arithmetic_is_counted(monkeypatch, capsys):
    monkeypatch.setattr(records, "_flops", {})
    for count in ("forward_flops", "optimizer_flops"):
        monkeypatch.setattr(records, count, lambda *given: 1.0)
    records.flops_per_image("vlb")
    records.flops_per_image("vlb")
    assert capsys.readouterr().err.count("\n") == 1


def test_test_images_are_scored_of_named_records_alone():
    with pytest.raises(ValueError, match="name them with --records"):
        records.main(["--workdir=none", "--test"])
    with pytest.raises(ValueError, match=r"there is no configs/records/vbl.py; there are .*vlb"):
        records.main(["--workdir=none", "--records=vbl"])


def test_a_failed_run_is_named_with_its_reason(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(records, "flops_per_image", lambda name: 2.4e9)
    failures = {"8min-vlb-seed0": "train.num_steps was 634"}
    monkeypatch.setattr(records.sweep, "run_cells", lambda cells, directory, with_quality: failures)
    assert records.main([f"--workdir={tmp_path}", "--records=vlb", "--seeds=1"]) == 1
    assert capsys.readouterr().err.endswith("failed: 8min-vlb-seed0: train.num_steps was 634\n")


def test_a_run_that_cannot_be_scored_stops_no_other_and_the_reasons_so_far_are_kept(monkeypatch, tmp_path, capsys):
    scored = []

    def score(directory, name, split):
        if directory.name.endswith("seed1"):
            raise OSError("the disk does not answer")
        scored.append(directory.name)

    monkeypatch.setattr(records, "flops_per_image", lambda name: 2.4e9)
    of_training = {"8min-vlb-seed0": "out of memory"}
    monkeypatch.setattr(records.sweep, "run_cells", lambda cells, directory, with_quality: of_training)
    monkeypatch.setattr(records, "score", score)
    assert records.main([f"--workdir={tmp_path}", "--records=vlb", "--seeds=3"]) == 1
    assert scored == ["8min-vlb-seed2"]
    printed = capsys.readouterr().err
    assert "8min-vlb-seed0: out of memory" in printed and "8min-vlb-seed1: the disk does not answer" in printed


@pytest.mark.parametrize(("error", "code"), [(OSError("no space"), 1), (TypeError("a bug"), None)])
def test_the_reason_of_a_failure_is_printed_even_if_the_report_cannot_be_written(
    monkeypatch, tmp_path, capsys, error, code
):
    def write(directory):
        raise error

    monkeypatch.setattr(records, "flops_per_image", lambda name: 2.4e9)
    monkeypatch.setattr(records, "run", lambda *_: {"8min-vlb-seed0": "out of memory"})
    monkeypatch.setattr(records, "write", write)
    command = [f"--workdir={tmp_path}", "--records=vlb", "--seeds=1"]
    if code:
        assert records.main(command) == code
    else:
        with pytest.raises(TypeError, match="a bug"):
            records.main(command)
    assert capsys.readouterr().err.endswith("failed: 8min-vlb-seed0: out of memory\n")


def scores(bpd, **more):
    facts = {"num_params": 1234, "steps": 520, "images_per_second": 40.0}
    return facts | {"validation_bpd": bpd, "validation_decoder_bpd": 1.0, "validation_kl_bpd": bpd - 1} | more


def test_the_table_pairs_a_record_with_its_start_by_seed_and_lists_the_best_first():
    start = Entry("vlb", 8, "hybrid", "the bound", 2.4e9, {"0": scores(4.0), "1": scores(4.5)})
    better = Entry("v", 8, "vlb", "v", 2.4e9, {"1": scores(4.25, test_bpd=4.3), "0": scores(3.75)})
    longer = Entry("v", 33, "vlb", "v", 2.4e9, {"0": scores(3.5)})
    lines = records_report.markdown([start, better, longer]).splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| v")]
    heads = next(line for line in lines if line.startswith("| record")).strip("| ").split(" | ")
    assert [row[0] for row in rows] == ["| v", "| vlb", "| v"]
    best, other, alone = (dict(zip(heads, row, strict=True)) for row in rows)
    assert best["less its start"] == "-0.250 (all 2 equal)" and best["bits/dim, test"] == "4.300 (n = 1)"
    assert other["less its start"] == other["bits/dim, test"] == "–"
    assert alone["bits/dim, validation"] == "3.500" and alone["less its start"] == "–"


def test_a_cell_of_fewer_seeds_than_its_row_states_its_n():
    start = Entry("vlb", 8, "hybrid", "the bound", 2.4e9, {seed: scores(4.0, test_bpd=4.1) for seed in "01"})
    better = Entry("v", 8, "vlb", "v", 2.4e9, {seed: scores(3.75) for seed in "012"})
    rows = [line.split(" | ") for line in records_report.markdown([start, better]).splitlines() if line[:3] == "| v"]
    assert [row[2] for row in rows] == ["3.750 (all 3 equal)", "4.000 (all 2 equal)"]
    assert [row[5] for row in rows] == ["-0.250 (all 2 equal) (n = 2)", "–"]
    assert [row[6] for row in rows] == ["–", "4.100 (all 2 equal)"]


@pytest.fixture
def given(monkeypatch):
    """The weights, the variance and the images that `records.score` finds; `scored` counts the estimates."""
    images = np.zeros((6, 2, 2, 3), np.uint8)
    given = SimpleNamespace(weights="a" * 64, variance="learned_range", images=images, scored=0)

    def load(directory, claims):
        model = SimpleNamespace(p=SimpleNamespace(variance=given.variance))
        return SimpleNamespace(
            config=None, state=SimpleNamespace(sha256=given.weights), model_with=lambda variance: model
        )

    def load_splits(config):
        return Splits(*(Source("noise", split, given.images) for split in ("train", "validation", "test")))

    def estimate(model, source, numbers, unfinished):
        given.scored += 1
        return SimpleNamespace(summary=lambda split: {f"{split}_bpd": 3.0 + given.scored})

    monkeypatch.setattr(records.workdir, "load", load)
    monkeypatch.setattr(records.build, "load_splits", load_splits)
    monkeypatch.setattr(records.build, "bound_settings", lambda config: None)
    monkeypatch.setattr(records, "scored", lambda config: config)
    monkeypatch.setattr(records.devices, "replicate", lambda model: model)
    monkeypatch.setattr(records, "estimated_bound", lambda settings: estimate)
    return given


@pytest.mark.parametrize("changed", ["weights", "variance", "images", "NUM_TERMS", "NUM_SCORED"])
def test_a_record_is_scored_again_where_something_that_its_scores_depend_on_has_changed(
    given, tmp_path, monkeypatch, changed
):
    records.score(tmp_path, "vlb", "validation")
    records.score(tmp_path, "vlb", "validation")
    assert given.scored == 1
    if changed.isupper():
        monkeypatch.setattr(records, changed, {"NUM_TERMS": 11, "NUM_SCORED": 5}[changed])
    else:
        others = {"weights": "b" * 64, "variance": "learned", "images": given.images + 1}
        setattr(given, changed, others[changed])
    records.score(tmp_path, "vlb", "validation")
    assert given.scored == 2 and summary.read_json(tmp_path / "validation.json")["validation_bpd"] == 5.0


def test_scores_of_earlier_versions_which_say_less_are_kept(given, tmp_path):
    path = tmp_path / "validation.json"
    known = {"validation_bpd": 3.5, "validation_images": 6, "terms_per_image": 9, "ema_sha256": given.weights}
    summary.write_json(path, known)
    records.score(tmp_path, "vlb", "validation")
    assert given.scored == 0 and summary.read_json(path) == known
    path.write_text("{}")
    records.score(tmp_path, "vlb", "validation")
    assert given.scored == 1


def test_test_scores_of_another_training_are_not_beside_the_validation_scores(monkeypatch, tmp_path):
    monkeypatch.setattr(records, "flops_per_image", lambda name: 2.4e9)
    for seed, of_test in (("0", "old"), ("1", "new")):
        folder = scored_run(tmp_path, seed)
        summary.write_json(folder / "test.json", {"test_bpd": 4.5, "ema_sha256": of_test})
    assert records.entry_of(tmp_path, "vlb", 8).by_seed("test_bpd") == {"1": 4.5}


def scored_run(directory, seed, of_run="new", **keys):
    """A run of `vlb` with validation scores of the weights "new"; `of_run` is the digest in summary.json."""
    folder = directory / records.folder("vlb", 8, seed)
    folder.mkdir()
    config = config_lib.from_file(records.file("vlb"), {"seed": seed} | keys)
    (folder / "config.json").write_text(config_lib.to_json(config))
    summary.write_json(folder / "summary.json", {"num_params": 1234, "ema_sha256": of_run})
    numbers = {f"validation_{part}": 4.0 for part in ("bpd", "decoder_bpd", "kl_bpd")}
    summary.write_json(folder / "validation.json", numbers | {"ema_sha256": "new"})
    return folder


def left_out(directory, monkeypatch):
    """The seeds in the table of records.md, and the line below it."""
    monkeypatch.setattr(records, "flops_per_image", lambda name: 2.4e9)
    records.write(directory)
    lines = (directory / "records.md").read_text().splitlines()
    entry = records.entry_of(directory, "vlb", 8)
    return sorted(entry.runs), "".join(line for line in lines if line.startswith("Left out: "))


def test_scores_of_other_weights_than_the_runs_last_are_left_out_with_the_reason(monkeypatch, tmp_path):
    """Runs that continue or continued; a summary.json of an earlier version has no digest."""
    for seed, of_run in (("0", "new"), ("1", "of later steps"), ("2", None)):
        scored_run(tmp_path, seed, of_run)
    (scored_run(tmp_path, "3") / "summary.json").rename(tmp_path / "8min-vlb-seed3" / "summary_638.json")
    seeds, line = left_out(tmp_path, monkeypatch)
    assert seeds == ["0", "2"] and line == (
        "Left out: 8min-vlb-seed1/validation.json (of other weights than summary.json); "
        "8min-vlb-seed3/validation.json (the run has no summary.json)."
    )
    for seed in ("0", "2"):
        (tmp_path / f"8min-vlb-seed{seed}" / "summary.json").unlink()
    assert left_out(tmp_path, monkeypatch)[0] == [], "a report without a table"


def test_seeds_with_other_settings_share_no_interval(monkeypatch, tmp_path):
    scored_run(tmp_path, "0")
    alike = {"data.data_dir": "elsewhere", "train.log_every": "7", "eval.protocol": "ho2020"}
    scored_run(tmp_path, "1", **alike)
    scored_run(tmp_path, "2", **{"train.num_steps": "634", "unet.dropout": "0.25"})
    (scored_run(tmp_path, "3") / "config.json").write_text("{")
    seeds, line = left_out(tmp_path, monkeypatch)
    assert seeds == ["0", "1"]
    assert "seed2/validation.json (the config differs from 8min-vlb-seed0's in train.num_steps, unet.dropout);" in line
    assert "seed3/config.json is damaged" in line


def test_a_config_of_before_a_key_existed_is_no_other_config(monkeypatch, tmp_path):
    for seed in "01":
        scored_run(tmp_path, seed)
    path = tmp_path / "8min-vlb-seed1" / "config.json"
    groups = json.loads(path.read_text())
    del groups["unet"]["norm_eps"], groups["model"]["rescale_t"]
    path.write_text(json.dumps(groups))
    assert left_out(tmp_path, monkeypatch) == (["0", "1"], "")


@pytest.mark.slow
def test_a_record_from_training_to_the_table(tmp_path, capsys):
    """A step of two small networks on digits: nothing is read of the test images before --test asks for it."""
    small = ["unet.channels=8", "unet.num_groups=2", "unet.channel_mult=(1,)", "unet.attention_resolutions=()"]
    keys = [*small, "schedule.num_steps=50", "train.num_steps=1", "optim.warmup_steps=0"]
    keys += ["data.name=digits", "data.validation=-1", "data.flip=False", "sample.num_images=1", "sample.num_steps=2"]
    names = "--records=hybrid,vlb,simple_fixed_small"
    command = [f"--workdir={tmp_path}", names, "--seeds=1", "--set", *keys]
    assert records.main(command) == 0
    simple = tmp_path / "8min-simple_fixed_large-seed0"
    assert (simple / "validation-simple_fixed_small.json").exists() and not (simple / "validation.json").exists()
    run = tmp_path / "8min-vlb-seed0"
    assert not (run / "test.json").exists() and "test_bpd" not in summary.read_json(run / "summary.json")
    found = summary.read_json(run / "validation.json")
    assert found["validation_images"] == 130
    assert records.main([*command[:1], "--records=vlb", "--seeds=1", "--test", "--report", "--set", *keys]) == 0
    assert not (run / "test.json").exists()
    assert records.main([*command[:1], "--records=vlb", "--seeds=1", "--test", "--set", *keys]) == 0
    assert summary.read_json(run / "test.json")["test_images"] == 299
    assert summary.read_json(run / "validation.json") == found
    assert "[png](8min-vlb-seed0/samples.png)" in (tmp_path / "records.md").read_text()
    assert "less its start" in capsys.readouterr().out and (tmp_path / "records.png").exists()
