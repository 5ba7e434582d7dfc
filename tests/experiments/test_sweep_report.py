"""A sweep's report: what is made of the folders of its runs, and the published numbers beside it."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from diffusion.experiment import config as config_lib
from experiments import ho2020, results, sweep, sweep_plots, sweep_report, variance
from experiments.sweep import Cell

ROOT = Path(__file__).parents[2]
BASE = "configs/digits_fixed.py"
AXES = {
    "prediction": ["eps"], "objective": ["vlb"], "variance": ["fixed_small", "fixed_large"], "schedule": ["cosine"],
    "T": ["4"], "seed": ["0", "1"],
}  # fmt: skip
FIRST = "eps-vlb-fixed_small-cosine-T4-seed0"


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def write_run(directory, name, image_bpd, config, **summary):
    """The folder of a finished run with these bounds, as train.run leaves it."""
    folder = directory / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config_lib.to_json(config))
    terms = image_bpd.mean() * np.array([0.5, 0.3, 0.15, 0.05])
    np.savez(folder / "bpd.npz", test_image_bpd=image_bpd, test_terms_bpd=terms)
    numbers = {
        "test_bpd": image_bpd.mean(), "test_decoder_bpd": terms[0], "test_kl_bpd": terms[1:].sum(), "prior_bpd": 1e-5,
        "train_bpd": image_bpd.mean() - 0.1, "test_images": len(image_bpd),
        "device": "cpu ×1", "versions": {"jax": "0"}, "ema_sha256": name,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(numbers | summary))


@pytest.fixture
def finished(tmp_path):
    """Two variances × two seeds with bounds that share what makes an image hard; returns bounds [seed, image]."""
    generator = np.random.default_rng(0)
    hardness = generator.normal(3.0, 0.5, 40)
    bounds = {
        name: np.stack([hardness + shift + generator.normal(0, 0.02, 40) + 0.01 * seed for seed in (0, 1)])
        for name, shift in (("fixed_small", 0.0), ("fixed_large", 0.2))
    }
    for cell in sweep.grid(BASE, AXES, {}):
        image_bpd = bounds[cell.overrides["model.variance"]][int(cell.overrides["seed"])]
        write_run(tmp_path, cell.name, image_bpd, cell.config())
    return bounds


def table_and_base(directory, name):
    """The rows, and that of the run of this name."""
    table, _ = results.rows(results.read(directory)[0])
    return table, next(row for row in table for run in row.runs if run.name == name)


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


def write_quality(directory, name, distance, **changes):
    """The quality.json of a run of `write_run`, as --mode=quality leaves it."""
    scores = {"fid": distance, "frechet_distance": distance, "num_samples": 50, "features": "classifier"}
    (directory / name / "quality.json").write_text(json.dumps(scores | {"ema_sha256": name} | changes))


@pytest.fixture
def measured(finished, tmp_path):
    """The finished runs with a Fréchet distance each; returns distances [seed]."""
    distances = {"fixed_small": [30.0, 34.0], "fixed_large": [20.0, 21.0]}
    for name, by_seed in distances.items():
        for seed, distance in enumerate(by_seed):
            write_quality(tmp_path, f"eps-vlb-{name}-cosine-T4-seed{seed}", distance)
    return distances


def columns(directory):
    """The cells of the first table of table.md, by column."""
    head, _, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (directory / "table.md").read_text().partition("\n## ")[0].splitlines()
        if line.startswith("|")
    ]
    return dict(zip(head, zip(*lines, strict=True), strict=True))


def test_the_table_has_both_numbers_of_every_row(measured, tmp_path):
    sweep_report.write(tmp_path, variance.target_by_config)
    assert columns(tmp_path)["variance"] == ("fixed_small", "fixed_large")
    # means; Student's quantile of two values is 12.706, their standard errors are 2 and 0.5
    found = columns(tmp_path)["Fréchet distance (classifier), 50 samples"]
    assert found == ("32.00 ± 25.41", "20.50 ± 6.35")
    with (tmp_path / "table.csv").open() as file:
        lines = {line["variance"]: line for line in csv.DictReader(file)}
    for name, by_seed in measured.items():
        np.testing.assert_allclose(float(lines[name]["frechet_distance"]), np.mean(by_seed))
        half_width = 12.7062 * abs(by_seed[0] - by_seed[1]) / 2
        np.testing.assert_allclose(float(lines[name]["frechet_distance_half_width"]), half_width, rtol=1e-5)
        assert (lines[name]["features"], lines[name]["num_samples"]) == ("classifier", "50")


@pytest.mark.parametrize(
    ("features", "title"), [("inception", "FID (inception)"), ("pixels", "Fréchet distance (pixels)")]
)
def test_only_the_distance_of_inceptions_features_is_called_fid(measured, tmp_path, features, title):
    for folder in tmp_path.glob("*-seed*"):
        write_quality(tmp_path, folder.name, 3.17, features=features)
    sweep_report.write(tmp_path, variance.target_by_config)
    assert f"{title}, 50 samples" in columns(tmp_path)


def test_distances_of_two_kinds_are_two_columns_and_have_no_mean(measured, tmp_path):
    for name, distance in (("fixed_small", 8.0), ("fixed_large", 7.0)):
        write_quality(tmp_path, f"eps-vlb-{name}-cosine-T4-seed0", distance, num_samples=100)
    write_quality(tmp_path, "eps-vlb-fixed_small-cosine-T4-seed1", 9.0, num_samples=100)
    sweep_report.write(tmp_path, variance.target_by_config)
    found = {head: cells for head, cells in columns(tmp_path).items() if "Fréchet" in head}
    assert found == {"Fréchet distance (classifier), 100 samples": ("8.50 ± 6.35", "–")}
    write_quality(tmp_path, "eps-vlb-fixed_large-cosine-T4-seed0", 20.0)
    sweep_report.write(tmp_path, variance.target_by_config)
    assert columns(tmp_path)["Fréchet distance (classifier), 50 samples"] == ("–", "20.50 ± 6.35")


def test_distances_by_two_trainings_of_the_features_are_two_columns(measured, tmp_path):
    for seed, sha256 in enumerate(["a" * 64, "a" * 64]):
        write_quality(tmp_path, f"eps-vlb-fixed_small-cosine-T4-seed{seed}", 8.0 + seed, weights_sha256=sha256)
    sweep_report.write(tmp_path, variance.target_by_config)
    found = {head: cells for head, cells in columns(tmp_path).items() if "Fréchet" in head}
    assert found == {
        "Fréchet distance (classifier), 50 samples": ("–", "20.50 ± 6.35"),
        "Fréchet distance (classifier), 50 samples, network aaaaaaaa": ("8.50 ± 6.35", "–"),
    }


@pytest.mark.parametrize("damage", ["absent", "of other weights", "cut"])
def test_a_run_whose_samples_were_not_measured_keeps_its_bound(measured, tmp_path, damage):
    name = "eps-vlb-fixed_small-cosine-T4-seed0"
    path = tmp_path / name / "quality.json"
    if damage == "of other weights":
        write_quality(tmp_path, name, 1.0, ema_sha256="of an earlier step")
    else:
        path.write_text(path.read_text()[:20]) if damage == "cut" else path.unlink()
    (tmp_path / name / "log.txt").write_text("$ python main.py\nerror: no memory\n")
    text = sweep_report.write(tmp_path, variance.target_by_config)
    found = columns(tmp_path)
    assert found["Fréchet distance (classifier), 50 samples"] == ("–", "20.50 ± 6.35")
    assert found["seeds"] == ("2", "2")
    assert f"- {name} has no Fréchet distance: error: no memory" in text


def test_runs_on_other_data_share_no_row(finished, tmp_path):
    """The same config with a data set that was exchanged meanwhile; runs of earlier versions do not know theirs."""
    paths = sorted(tmp_path.glob("*/summary.json"))

    def rows_where(*digests):
        for path, digest in zip(paths, digests, strict=True):
            known = {"data_sha256": {"train": digest, "test": "ab"}} if digest else {}
            numbers = {k: v for k, v in json.loads(path.read_text()).items() if k != "data_sha256"}
            path.write_text(json.dumps(numbers | known))
        return results.rows(results.read(tmp_path)[0])[0]

    assert [len(row.runs) for row in rows_where("aa", "aa", "aa", "")] == [2, 2]
    assert [len(row.runs) for row in rows_where("aa", "bb", "aa", "aa")] == [1, 1, 2]


def test_a_sweep_without_samples_has_no_such_column(finished, tmp_path):
    assert "has no Fréchet distance" not in sweep_report.write(tmp_path, variance.target_by_config)
    assert not [head for head in columns(tmp_path) if "Fréchet" in head]
    assert not (tmp_path / "quality.png").exists()


def record_figures(monkeypatch):
    """The figures of sweep_plots that will be made."""
    figures = []
    monkeypatch.setattr(sweep_plots, "Figure", lambda **size: figures.append(Figure(**size)) or figures[-1])
    return figures


def drawn(monkeypatch, directory, published):
    """The points and the diamonds of quality.png, [n, 2] each."""
    figures = record_figures(monkeypatch)
    rows = results.rows(results.read(directory)[0])[0]
    sweep_plots.quality(directory / "quality.png", rows, published)
    (axes,) = figures[0].axes
    lines = [(line.get_marker(), line.get_xydata()) for line in axes.lines]
    points = [data for marker, data in lines if marker in sweep_plots.MARKERS]
    diamonds = [data for marker, data in lines if marker == "D"]
    return [np.concatenate([*data, np.zeros((0, 2))]) for data in (points, diamonds)]


def test_the_plot_has_a_point_per_row_and_published_fids(finished, measured, tmp_path, monkeypatch):
    def published(run):
        return results.Target("a paper", test_bpd=2.94, fid=11.47)

    points, diamonds = drawn(monkeypatch, tmp_path, published)
    wanted = [(finished[name].mean(), np.mean(measured[name])) for name in ("fixed_large", "fixed_small")]
    np.testing.assert_allclose(points[np.argsort(points[:, 1])], wanted)
    assert not len(diamonds), "a FID is not drawn on the scale of other features"
    for folder in tmp_path.glob("*-seed*"):
        write_quality(tmp_path, folder.name, 3.17, features="inception")
    points, diamonds = drawn(monkeypatch, tmp_path, published)
    np.testing.assert_array_equal(points[:, 1], [3.17, 3.17])
    np.testing.assert_array_equal(np.unique(diamonds, axis=0), [[2.94, 11.47]])
    assert np.asarray(Image.open(tmp_path / "quality.png")).min() < 100


def test_bits_per_dim_are_drawn_beside_their_differences_to_the_base(finished, tmp_path, monkeypatch):
    figures = record_figures(monkeypatch)
    table, base = table_and_base(tmp_path, FIRST)
    sweep_plots.bpd(tmp_path / "bpd.png", table, results.less_base(table, base), lambda run: None)
    totals, differences = figures[0].axes
    place = [row.setting["variance"] for row in table].index("fixed_large")
    means = [line.get_xydata()[0].tolist() for line in differences.lines if line.get_marker() == "o"]
    by_seed = (finished["fixed_large"] - finished["fixed_small"]).mean(axis=1)
    assert means == [[pytest.approx(by_seed.mean()), place]]
    seeds = [line.get_xdata() for line in differences.lines if line.get_marker() == "|" and len(line.get_xdata()) == 2]
    np.testing.assert_allclose(seeds[0], by_seed)
    assert len([line for line in totals.lines if line.get_marker() == "o" and len(line.get_xdata())]) == 2
    sweep_plots.bpd(tmp_path / "bpd.png", [base], [None], lambda run: None)
    assert len(figures[1].axes) == 1, "the base alone has no differences"


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
    best = ho2020.ROWS[-1].cell("full", "0", {})
    assert published(best.base, **best.overrides).test_bpd == 2.94
    for key in ("unet.norm_eps", "model.rescale_t", "data.flip"):
        assert published(best.base, **{name: value for name, value in best.overrides.items() if name != key}) is None
    older = config_lib.flatten(best.config())
    del older["unet.norm_eps"]  # a run that was made before the key existed
    assert variance.target_by_config(results.FinishedRun("run", older, {}, {}, np.zeros(2), np.zeros(2))) is None
    # They trained with dropout 0.3 under the cosine schedule alone.
    assert published(best.base, **best.overrides | {"unet.dropout": "0.1"}) is None
