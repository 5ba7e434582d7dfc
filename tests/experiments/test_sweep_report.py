"""A sweep's report: made from the folders of its runs, beside published numbers."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from sweep_runs import AXES, BASE, FIRST, columns, table_and_base, write_run

from diffusion.experiment import config as config_lib
from experiments import ho2020, results, sweep, sweep_report, variance
from experiments.sweep import Cell

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def less_base(directory, name=FIRST):
    """The differences to the base, by variance."""
    table, base = table_and_base(directory, name)
    found = zip(table, results.less_base(table, base), strict=True)
    return {row.setting["variance"]: difference for row, difference in found if difference}


def test_differences_to_the_base_are_of_the_same_seeds(finished, tmp_path):
    found = less_base(tmp_path)
    assert list(found) == ["fixed_large"], "the base itself has none"
    a, b = finished["fixed_large"], finished["fixed_small"]
    by_seed = (a - b).mean(axis=1)
    difference = found["fixed_large"]
    assert difference.bpd == pytest.approx({0: by_seed[0], 1: by_seed[1]}, rel=1e-9)
    np.testing.assert_allclose(difference.stderr_bpd, stats.sem((a - b).mean(axis=0)))
    # Pairing is what it is worth: unpaired, the same difference drowns in how hard the images are.
    assert difference.stderr_bpd < 0.1 * stats.sem(a.mean(axis=0))


def test_a_seed_in_two_folders_counts_once_in_every_mean(finished, tmp_path):
    of_seed_0 = config_lib.from_json((tmp_path / FIRST / "config.json").read_text())
    write_run(tmp_path, "zz-again", finished["fixed_small"][0], of_seed_0)
    row = table_and_base(tmp_path, FIRST)[1]
    assert len(row.runs) == 3 and row.of_seeds[0].name == "zz-again"
    assert row.mean("train_bpd") == pytest.approx(finished["fixed_small"].mean() - 0.1)
    assert row.stderr_bpd == pytest.approx(stats.sem(finished["fixed_small"].mean(axis=0)))


def test_a_seed_that_only_one_of_them_has_is_left_out_of_their_difference(finished, tmp_path):
    """Of as many runs each, seeds 0 and 1 here and 1 and 2 there, seed 1 alone is a pair."""
    other = tmp_path / "eps-vlb-fixed_large-cosine-T4-seed0"
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"seed": 2}))
    difference = less_base(tmp_path)["fixed_large"]
    by_image = finished["fixed_large"][1] - finished["fixed_small"][1]
    assert difference.bpd == pytest.approx({1: by_image.mean()})
    assert difference.stderr_bpd == pytest.approx(stats.sem(by_image))
    text = sweep_report.write(tmp_path, lambda run: None, [FIRST])
    assert columns(tmp_path)["seeds"] == ("2 of 3: not 2", "2 of 3: not 0")
    assert "is of runs of the same seed: one seed, no interval" in text
    shutil.rmtree(tmp_path / "eps-vlb-fixed_large-cosine-T4-seed1")
    text = sweep_report.write(tmp_path, lambda run: None, [FIRST])
    assert "no seed in common" in text


def test_runs_that_scored_other_images_are_not_compared(finished, tmp_path):
    path = tmp_path / "eps-vlb-fixed_large-cosine-T4-seed0" / "summary.json"
    both = [path, tmp_path / "eps-vlb-fixed_large-cosine-T4-seed1" / "summary.json"]
    for path in both:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"test_images": 39}))
    assert less_base(tmp_path) == {}


def test_the_base_is_the_first_setting_of_the_sweep_with_a_finished_run(finished, tmp_path):
    names = ["not-started", "eps-vlb-fixed_large-cosine-T4-seed1", FIRST]
    for order, base in ((names, "fixed_large"), ([FIRST], "fixed_small"), ([], "fixed_large")):
        text = sweep_report.write(tmp_path, lambda run: None, order)
        assert f"## Paired differences to the base: eps, vlb, {base}, cosine, T = 4\n" in text
        assert ("- not-started is not started" in text) == ("not-started" in order)


def test_the_table_has_intervals_over_seeds_beside_errors_over_images(finished, tmp_path):
    """Of two seeds Student's quantile is 12.706."""
    text = sweep_report.write(tmp_path, lambda run: None, [FIRST])
    for name, shown, image_error in zip(
        ("fixed_small", "fixed_large"),
        columns(tmp_path)["test bits/dim"],
        columns(tmp_path)["standard error over images"],
        strict=True,
    ):
        by_seed = finished[name].mean(axis=1)
        assert shown == f"{by_seed.mean():.4f} ± {12.7062 * abs(by_seed[0] - by_seed[1]) / 2:.4f}"
        assert image_error == f"{stats.sem(finished[name].mean(axis=0)):.4f}"
    assert text.count("mean ± 95% interval (Student's t, n = 2 seeds)") == 2
    by_seed = (finished["fixed_large"] - finished["fixed_small"]).mean(axis=1)
    less = f"{by_seed.mean():+.4f} ± {12.7062 * abs(by_seed[0] - by_seed[1]) / 2:.4f}"
    assert f"| {less} | 0: {by_seed[0]:+.4f}, 1: {by_seed[1]:+.4f} |" in text
    with (tmp_path / "table.csv").open() as file:
        base, other = csv.DictReader(file)
    assert base["less_base_bpd"] == "" and float(other["less_base_bpd"]) == pytest.approx(by_seed.mean())
    half_width = 12.7062 * abs(by_seed[0] - by_seed[1]) / 2
    assert float(other["less_base_bpd_half_width"]) == pytest.approx(half_width, rel=1e-4)
    assert other["paired_seeds"] == "2"


def test_validation_images_say_what_is_best_where_every_run_has_some(finished, tmp_path):
    """They rank the settings the other way round than the test images."""
    assert "Rows are in order of the test images' bits/dim" in sweep_report.write(tmp_path, lambda run: None, [FIRST])
    paths = {name: sorted(tmp_path.glob(f"*{name}*/summary.json")) for name in ("fixed_small", "fixed_large")}
    for bpd, name in enumerate(["fixed_large", "fixed_small"], start=2):
        for seed, path in enumerate(paths[name]):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"validation_bpd": bpd + seed}))
    text = sweep_report.write(tmp_path, lambda run: None, [FIRST])
    assert "Rows are in order of the bits/dim of validation images" in text
    half_width = 12.7062 / 2
    shown = tuple(f"{mean} ± {half_width:.4f}" for mean in ("2.5000", "3.5000"))
    assert columns(tmp_path)["validation bits/dim"] == shown
    with (tmp_path / "table.csv").open() as file:
        assert [row["variance"] for row in csv.DictReader(file)] == ["fixed_large", "fixed_small"]
    summary = json.loads(paths["fixed_small"][0].read_text())
    del summary["validation_bpd"]
    paths["fixed_small"][0].write_text(json.dumps(summary))
    assert "Rows are in order of the test images' bits/dim" in sweep_report.write(tmp_path, lambda run: None, [FIRST])


def test_one_seed_has_no_interval(finished, tmp_path):
    for folder in tmp_path.glob("*-seed1"):
        shutil.rmtree(folder)
    text = sweep_report.write(tmp_path, lambda run: None, [FIRST])
    assert "one seed, no interval" in text and "±" not in text
    assert columns(tmp_path)["test bits/dim"][0] == f"{finished['fixed_small'][0].mean():.4f}"
    assert columns(tmp_path)["standard error over images"][0] == f"{stats.sem(finished['fixed_small'][0]):.4f}"


def test_variances_are_compared_within_the_rest_of_the_setting(tmp_path):
    """Three variances under one objective, and the first under another, which is the base."""
    rows = [("simple", "fixed_small"), ("vlb", "fixed_small"), ("vlb", "fixed_large"), ("vlb", "learned")]
    for i, (objective, name) in enumerate(rows):
        for cell in sweep.grid(BASE, AXES | {"objective": [objective], "variance": [name]}, {}):
            write_run(tmp_path, cell.name, np.arange(5.0) + i, cell.config())
    table, base = table_and_base(tmp_path, "eps-simple-fixed_small-cosine-T4-seed0")
    pairs = {found.setting["variances"]: found.bpd for found in results.between_variances(table, base)}
    assert pairs == {
        "fixed_large − fixed_small": {0: 1.0, 1: 1.0},
        "fixed_large − learned": {0: -1.0, 1: -1.0},
        "fixed_small − learned": {0: -2.0, 1: -2.0},
    }
    table, base = table_and_base(tmp_path, FIRST)
    pairs = [found.setting["variances"] for found in results.between_variances(table, base)]
    assert pairs == ["fixed_large − learned"], "the base's are in the other table"


def test_rows_are_means_over_seeds_with_both_kinds_of_error(finished, tmp_path):
    rows, recipes = results.rows(results.read(tmp_path)[0])
    assert recipes == {} and [len(row.runs) for row in rows] == [2, 2]
    for row in rows:
        bounds = finished[row.setting["variance"]]
        np.testing.assert_allclose(row.mean("test_bpd"), bounds.mean())
        np.testing.assert_allclose(row.stderr_bpd, stats.sem(bounds.mean(axis=0)))
        assert row.bpd == pytest.approx(dict(enumerate(bounds.mean(axis=1))))


def test_runs_scored_by_an_estimate_have_a_table_with_the_errors_that_they_state(finished, tmp_path):
    """Of a few terms per image there is no bpd.npz: no error of pairs of images and no curve, but everything else."""
    for folder in (path.parent for path in tmp_path.glob("*/bpd.npz")):
        (folder / "bpd.npz").unlink()
        config = json.loads((folder / "config.json").read_text())
        config["eval"]["terms_per_image"] = 3
        (folder / "config.json").write_text(json.dumps(config))
        summary = json.loads((folder / "summary.json").read_text())
        stated = (0.01 if "fixed_small" in folder.name else 0.02) / (1 + config["seed"])
        (folder / "summary.json").write_text(json.dumps(summary | {"test_bpd_stderr": stated}))
    text = sweep_report.write(tmp_path, lambda run: None)
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    errors = {row["variance"]: float(row["test_bpd_stderr"]) for row in rows}
    assert errors == {"fixed_small": 0.01, "fixed_large": 0.02}
    for row in rows:
        assert float(row["test_bpd"]) == pytest.approx(finished[row["variance"]].mean())
    by_seed = (finished["fixed_small"] - finished["fixed_large"]).mean(axis=1)
    assert "40 test images" in text and f"| 0: {by_seed[0]:+.4f}, 1: {by_seed[1]:+.4f} | – |" in text
    assert (tmp_path / "bpd.png").exists() and not (tmp_path / "terms.png").exists()


@pytest.mark.parametrize("few", [0, 9])
def test_the_protocol_is_that_of_the_scores_whatever_was_written_into_the_config_later(tmp_path, few):
    """Of an estimate there is no bpd.npz, which a config without eval.terms_per_image would ask for."""
    later = {"eval.protocol": "ho2020", "eval.terms_per_image": "0" if few else "9"}
    said = {"name": "nichol2021", "estimator": f"{few} terms per image: t = 1 and more" if few else "every term"}
    write_run(tmp_path, "run", np.arange(4.0), Cell("", BASE, later).config(), protocol=said)
    if few:
        (tmp_path / "run" / "bpd.npz").unlink()
    ((run,), _) = results.read(tmp_path)
    assert (run.config["eval.protocol"], run.config["eval.terms_per_image"]) == ("nichol2021", few)
    assert (run.image_bpd is None) == bool(few)


def test_runs_of_another_recipe_are_another_row(finished, tmp_path):
    longer = Cell("longer", BASE, {"train.num_steps": "9", "model.variance": "fixed_small", "schedule.num_steps": "4"})
    write_run(tmp_path, "longer", np.full(40, 2.0) + np.arange(40), longer.config())
    rows, recipes = results.rows(results.read(tmp_path)[0])
    assert len(rows) == 3 and not recipes
    assert [row.setting["train.num_steps"] for row in rows] == ["1000", "1000", "9"]
    assert not results.between_variances(rows, rows[0]), "of another recipe"


def test_runs_that_stopped_early_are_counted_and_another_patience_is_another_row(tmp_path):
    for patience, step in (("2", 400), ("5", 1200), ("0", 1600)):
        # Of other seeds, or the patience would be a column in any case.
        keys = {"train.patience": patience, "data.validation": "-1", "seed": patience}
        stopped = {"stopped_early": {"validations": int(patience)}} if step < 1600 else {}
        write_run(tmp_path, patience, np.arange(4.0), Cell("", BASE, keys).config(), step=step, **stopped)
    runs, _ = results.read(tmp_path)
    table, _ = results.rows(runs)
    assert {row.setting["train.patience"] for row in table} == {"0", "2", "5"} and len(table) == 3
    assert "images; 2 of 3 runs stopped early, at step 400 to 1,200; cpu" in sweep_report._head(runs, table)


def test_runs_that_differ_in_how_they_are_sampled_are_rows_where_their_seed_is_the_same(finished, tmp_path):
    """Without `--axis sample.method=…` such a key may differ within a row."""

    def methods():
        return [row.setting.get("sample.method") for row in results.rows(results.read(tmp_path)[0])[0]]

    assert methods() == [None, None]
    cell = sweep.grid(BASE, AXES, {})[0]
    other = Cell("ddim", BASE, cell.overrides | {"sample.method": "ddim"})
    write_run(tmp_path, "ddim", np.full(40, 2.0) + np.arange(40), other.config())
    assert sorted(methods()) == ["ancestral", "ancestral", "ddim"]


def test_where_many_keys_differ_the_table_has_a_letter_for_all_of_them(finished, tmp_path):
    keys = {"train.num_steps": "9", "optim.grad_clip": "2", "optim.warmup_steps": "3", "ema.decay": "0.5"}
    longer = Cell("longer", BASE, keys | {"model.variance": "fixed_small", "schedule.num_steps": "4"})
    write_run(tmp_path, "longer", np.full(40, 2.0) + np.arange(40), longer.config())
    rows, recipes = results.rows(results.read(tmp_path)[0])
    assert len(rows) == 3 and sorted(recipes) == ["a", "b"]
    assert "ema.decay=0.5, optim.grad_clip=2.0, optim.warmup_steps=3, train.num_steps=9" in recipes.values()


def test_a_run_that_is_older_than_a_key_shares_a_row_with_one_that_has_it(finished, tmp_path):
    """Seed 0 is of an earlier version, whose networks had fewer keys; seed 1 was run later."""
    for path in tmp_path.glob("*-seed0/config.json"):
        config = json.loads(path.read_text())
        del config["unet"]["norm_eps"], config["model"]["rescale_t"]
        path.write_text(json.dumps(config))
    table, recipes = results.rows(results.read(tmp_path)[0])
    assert [list(row.bpd) for row in table] == [[0, 1], [0, 1]] and not recipes


def test_report_is_rebuilt_from_the_folders(finished, tmp_path, capsys):
    cut = tmp_path / "eps-cut"
    cut.mkdir()
    (cut / "config.json").write_text("{}")
    (cut / "log.txt").write_text("$ python main.py\nerror: out of luck\n\n")
    unscored = tmp_path / "eps-unscored"
    unscored.mkdir()
    (unscored / "config.json").write_text("{}")
    (unscored / "summary.json").write_text('{"step": 3}')
    assert variance.main([f"--workdir={tmp_path}", "--report"]) == 0
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    best, worst = (finished[name].mean() for name in ("fixed_small", "fixed_large"))
    assert text.index(f"| {best:.4f} ±") < text.index(f"| {worst:.4f} ±")
    assert "eps-cut is not finished: error: out of luck" in text
    assert "eps-unscored is not finished: trained, and not scored (eval.num_images=-1)" in text
    with (tmp_path / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    np.testing.assert_allclose([float(line["test_bpd"]) for line in lines], [best, worst])
    for name in ("bpd.png", "terms.png"):
        assert np.asarray(Image.open(tmp_path / name)).min() < 100
    page = (tmp_path / "report.html").read_text()
    assert all(f'<data value="{line["test_bpd"]}"' in page for line in lines)
    assert "eps-cut" in page and "runs: 5 finished, 1 begun" in page


def test_a_finished_run_whose_config_cannot_be_read_is_named_beside_the_others(finished, tmp_path):
    (tmp_path / FIRST / "config.json").write_text("{")
    text = sweep_report.write(tmp_path, lambda run: None)
    path = tmp_path / FIRST / "config.json"
    assert f"- {FIRST} is not finished: {path} is damaged" in text
    assert sorted(columns(tmp_path)["seeds"]) == ["1 of 2: not 0", "2"]


def test_a_report_of_nothing_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run in .* is finished"):
        sweep_report.write(tmp_path, variance.target_by_config)


def test_published_numbers_stand_beside_the_settings_that_they_are_of():
    def published(base, **keys):
        cell = Cell("run", base, {key.replace("__", "."): value for key, value in keys.items()})
        config = config_lib.flatten(config_lib.from_json(config_lib.to_json(cell.config())))
        return variance.target_by_config(results.FinishedRun("run", config, {}, {}, np.zeros(2), np.zeros(2)))

    assert published("configs/cifar10.py", train__num_steps="10").test_bpd == 3.75
    assert published("configs/cifar10.py", objective__name="vlb").test_bpd == 3.70
    assert published("configs/cifar10.py", model__variance="fixed_small") is None
    assert published(BASE) is None
    # Two papers have a row with these axes: the recipe tells them apart.
    linear = next(row for row in ho2020.ROWS if row.name == "improved-linear-T1000-simple").cell("full", "0", {})
    assert published(linear.base, **linear.overrides) == results.Target("Nichol & Dhariwal", test_bpd=3.73, fid=3.29)
    best = ho2020.ROWS[-1].cell("full", "0", {})
    assert published(best.base, **best.overrides).test_bpd == 2.94
    for key in ("unet.norm_eps", "model.rescale_t", "data.flip"):
        assert published(best.base, **{name: value for name, value in best.overrides.items() if name != key}) is None
    older = config_lib.flatten(best.config())
    del older["unet.norm_eps"]  # a run that was made before the key existed
    assert variance.target_by_config(results.FinishedRun("run", older, {}, {}, np.zeros(2), np.zeros(2))) is None
    # They trained with dropout 0.3 under the cosine schedule alone.
    assert published(best.base, **best.overrides | {"unet.dropout": "0.1"}) is None
