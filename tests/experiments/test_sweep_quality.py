"""A sweep's report with scored samples: the distances of its runs, in the table and beside the bounds."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from sweep_runs import BASE, FIRST, columns, table_and_base, write_run

from experiments import results, sweep_plots, sweep_report, variance
from experiments.sweep_grid import Cell

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


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
    text = sweep_report.write(tmp_path, variance.target_by_config)
    found = {head: cells for head, cells in columns(tmp_path).items() if "Fréchet" in head}
    assert found == {"Fréchet distance (classifier), 100 samples": ("8.50 ± 6.35", "–")}
    assert text.count("has no mean Fréchet distance") == 1 and (
        "- eps, vlb, fixed_large, cosine, T = 4 has no mean Fréchet distance, as its seeds have several kinds: "
        "Fréchet distance (classifier), 100 samples; Fréchet distance (classifier), 50 samples\n"
    ) in text
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
    with (tmp_path / "table.csv").open() as file:  # the page tells the kinds apart by these columns
        assert [row["features_sha256"] for row in csv.DictReader(file)] == ["aaaaaaaa", ""]


def test_distances_by_two_checkpoints_of_one_guide_have_no_mean(measured, tmp_path):
    used = {"method": "ancestral", "num_steps": 4, "variance": "fixed_small", "guide": "runs/worse"}
    for seed, sha256 in enumerate(["a" * 64, "b" * 64]):
        name = f"eps-vlb-fixed_small-cosine-T4-seed{seed}"
        write_quality(tmp_path, name, 8.0 + seed, sampler=used, guide_sha256=sha256)
    table, _ = table_and_base(tmp_path, FIRST)
    row = next(row for row in table if row.setting["variance"] == "fixed_small")
    assert row.distance_kind is None and row.distances == {}


def test_runs_from_two_states_of_the_run_that_init_from_names_are_two_rows(finished, tmp_path):
    """It has trained further between them. A run of an earlier version does not say where it started."""

    def rows_of(*digests):
        for seed, sha256 in enumerate(digests):
            path = tmp_path / f"eps-vlb-fixed_small-cosine-T4-seed{seed}" / "summary.json"
            numbers = {k: v for k, v in json.loads(path.read_text()).items() if k != "started_from"}
            started = {"started_from": {"init_from": "runs/old", "sha256": sha256}} if sha256 else {}
            path.write_text(json.dumps(numbers | started))
        return len(table_and_base(tmp_path, FIRST)[0])

    assert rows_of("aa", "aa") == rows_of("", "aa") == rows_of("", "") == 2
    assert rows_of("aa", "bb") > 2


OWN = {"method": "ancestral", "num_steps": 4, "labels": "all in turn", "guidance": 0.0, "guidance_interval": "every t"}
SPLIT = "digits, train split, 1498 images"


def write_drawn(directory, variance, seed, reference=SPLIT, **sampler):
    used = OWN | {"variance": variance, "seed": seed} | sampler
    name = f"eps-vlb-{variance}-cosine-T4-seed{seed}"
    write_quality(directory, name, 8.0 + seed, sampler=used, reference=reference)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "ddim"}, "sampler method=ddim, against"),
        ({"num_steps": 2}, "sampler num_steps=2, against"),
        ({"grid": "karras"}, "sampler grid=karras, against"),
        ({"guidance": 1.5}, "sampler guidance=1.5, against"),
        ({"reference": "digits, test split, 299 images"}, "against digits, test split"),
        ({"reference": f"/somewhere/stats.npz, SHA-256 {64 * 'a'}"}, "against stats.npz, SHA-256 aaaaaaaa"),
    ],
)
def test_distances_of_another_sampler_or_reference_are_not_subtracted_or_averaged(finished, tmp_path, change, said):
    """A model's own variance and T are no other sampler, and neither is a seed."""

    def less():
        table, base = table_and_base(tmp_path, FIRST)
        (difference,) = (found for found in results.less_base(table, base) if found)
        return table, difference

    for seed in (0, 1):
        write_drawn(tmp_path, "fixed_small", seed)
        write_drawn(tmp_path, "fixed_large", seed)
    table, difference = less()
    assert len({row.distance_kind for row in table}) == 1 and difference.distances == {0: 0.0, 1: 0.0}
    write_drawn(tmp_path, "fixed_large", 0, **change)
    table, difference = less()
    assert not difference.distances and [row.distances for row in table if not row.distance_kind] == [{}]
    write_drawn(tmp_path, "fixed_large", 1, **change)
    table, difference = less()
    assert not difference.distances and difference.bpd
    assert sorted(len(row.distances) for row in table) == [2, 2]
    assert [said in str(row.distance_kind) for row in table].count(True) == 1


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


def test_the_batch_size_of_the_evaluation_makes_no_other_row(finished, tmp_path):
    """The scores do not depend on it, so a sweep may continue with another one."""
    path = tmp_path / "eps-vlb-fixed_small-cosine-T4-seed1" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"eval": config["eval"] | {"batch_size": 7}}))
    table, _ = results.rows(results.read(tmp_path)[0])
    assert [len(row.bpd) for row in table] == [2, 2] and "eval.batch_size" not in table[0].setting


@pytest.mark.parametrize(
    ("one", "other", "is_comparable"),
    [
        (("ho2020", 0), ("exact", 256), False),  # the first 256, and 256 at random
        (("ho2020", 0), ("exact", 0), True),  # there are no others
        (("exact", 0), ("exact", 256), True),
        (("ho2020", 256), ("exact", 256), True),
    ],
)
def test_runs_are_compared_only_on_the_same_choice_of_images(tmp_path, one, other, is_comparable):
    for name, (protocol, num_images) in {"one": one, "other": other}.items():
        keys = {"eval.protocol": protocol, "eval.num_images": str(num_images)}
        write_run(tmp_path, name, np.arange(256.0), Cell("", BASE, keys).config())
    table, base = table_and_base(tmp_path, "one")
    assert [bool(found) for found in results.less_base(table, base)] == [False, is_comparable]


@pytest.mark.parametrize(
    ("numbers", "is_comparable"),
    [(("a", "b"), False), (("a", "a"), True), (("a", None), False)],  # the last as the config says it
)
def test_runs_that_say_the_numbers_of_their_images_are_compared_where_these_are_equal(tmp_path, numbers, is_comparable):
    """As where the protocol's first images are all images, of which the other run scored as many at random."""
    settings = ("one", "ho2020", "0"), ("other", "exact", "256")
    for (name, protocol, num_images), digest in zip(settings, numbers, strict=True):
        config = Cell("", BASE, {"eval.protocol": protocol, "eval.num_images": num_images}).config()
        said = {"test_numbers_sha256": digest} if digest else {}
        write_run(tmp_path, name, np.arange(256.0), config, **said)
    table, base = table_and_base(tmp_path, "one")
    assert [bool(found) for found in results.less_base(table, base)] == [False, is_comparable]


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
