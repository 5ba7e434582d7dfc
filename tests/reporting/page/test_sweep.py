"""The page of a sweep: its runs in a table with both scores, and the files of its program."""

import csv
import json
from urllib.parse import unquote

import numpy as np
import pytest

from diffusion.reporting import page, pictures
from diffusion.reporting.page import __main__ as command
from diffusion.reporting.page import numbers


@pytest.fixture
def sweep(tmp_path, make_run):
    """Two finished runs of two seeds, and one that has only begun."""
    for seed, (name, bpd) in enumerate({"vlb-seed0": 2.25, "vlb=1 #seed1": 2.0}.items()):
        directory = make_run(tmp_path / name, seed=seed, objective={"name": "vlb"})
        summary = json.loads((directory / "summary.json").read_text())
        (directory / "summary.json").write_text(json.dumps(summary | {"test_bpd": bpd}))
        quality = json.loads((directory / "quality.json").read_text())
        (directory / "quality.json").write_text(json.dumps(quality | {"frechet_distance": 10 * bpd}))
    begun = make_run(tmp_path / "simple-seed0", seed=0, objective={"name": "simple"})
    for name in ("summary.json", "quality.json", "eval.json"):
        (begun / name).unlink()
    return tmp_path


def test_a_run_is_a_row_with_both_numbers_its_settings_and_its_page(sweep, read_page):
    found = read_page(sweep)
    headings = found.of("th")
    assert {"seed", "objective.name"} <= set(headings), "the keys that differ"
    assert not {"data.name", "unet.channels"} & set(headings), "and no others"
    assert {"test bits/dim", "Fréchet distance (pixels)"} <= set(headings)
    assert {2.25, 2.0, 22.5, 20.0, 0.24} <= set(found.numbers)
    links = [attributes["href"] for attributes in found.all("a") if not attributes["href"].startswith("#")]
    assert len(links) == 3 and all((sweep / unquote(link)).is_file() for link in links)
    assert found.text().count(" (not finished)") == 1 and "stopped early" not in found.text()
    assert "runs: 2 finished, 1 begun" in found.text()
    assert {"lowest bits/dim: vlb=1 #seed1", "lowest Fréchet distance (pixels): vlb=1 #seed1"} <= set(found.of("dt"))


def test_a_run_that_stopped_early_is_named(sweep, read_page):
    path = sweep / "vlb-seed0" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"step": 40, "stopped_early": {"validations": 2}}))
    assert read_page(sweep).text().count(" (stopped early at step 40)") == 1


def test_distances_of_different_features_are_not_put_in_one_column(sweep, read_page):
    path = sweep / "vlb-seed0" / "quality.json"
    path.write_text(json.dumps({"fid": 3.17, "features": "2048", "num_samples": 50_000}))
    found = read_page(sweep)
    assert {"FID (2048)", "Fréchet distance (pixels)"} <= set(found.of("th"))
    assert not [name for name in found.of("dt") if "distance" in name or "FID" in name], "nothing is the lowest"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_samples": 50}, "num samples: 50"),
        ({"reference": "digits, test split"}, "reference: digits, test split"),
        ({"reference": f"/old/stats.npz, SHA-256 {64 * 'b'}"}, "reference: stats.npz, SHA-256 bbbbbbbb"),
        ({"weights_sha256": 64 * "a"}, "weights: aaaaaaaa"),
        ({"guide_sha256": 64 * "a"}, "sampler: guide_sha256=aaaaaaaa"),
        ({"sampler": {"method": "ddim", "num_steps": 6}}, "sampler: method=ddim"),
        ({"sampler": {"method": "ancestral", "num_steps": 3}}, "sampler: num_steps=3"),
    ],
)
def test_distances_of_another_kind_have_their_own_column_and_nothing_is_the_lowest(sweep, read_page, changes, said):
    path = sweep / "vlb-seed0" / "quality.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    found = read_page(sweep)
    titles = [heading for heading in found.of("th") if "Fréchet" in heading]
    assert f"Fréchet distance (pixels); {said}" in titles and len(titles) == 2
    assert not [name for name in found.of("dt") if "distance" in name]


def test_a_models_own_steps_and_variance_make_no_other_kind(sweep, read_page):
    own = {"method": "ancestral", "num_steps": 6, "variance": "learned_range", "seed": 4, "guidance": 0.0}
    path = sweep / "vlb-seed0" / "quality.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sampler": own}))
    assert "lowest Fréchet distance (pixels): vlb=1 #seed1" in read_page(sweep).of("dt")


@pytest.mark.parametrize("column", ["num_samples", "sampler", "reference", "features_sha256"])
def test_means_of_two_kinds_of_distances_are_not_ranked(sweep, read_page, column):
    kind = {"features": "pixels", "num_samples": "50", "sampler": "", "reference": "train", "features_sha256": ""}

    def cards(*kinds):
        common = {"T": "50", "seeds": "3", "test_bpd": "2.5"}
        rows = [common | {"frechet_distance": str(9 + i)} | kind for i, kind in enumerate(kinds)]
        with (sweep / "table.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        return [name for name in read_page(sweep).of("dt") if "lowest" in name]

    bpd = "lowest mean bits/dim, 3 seeds: 50"
    assert cards(kind, kind) == [bpd, "lowest mean Fréchet distance (pixels), 3 seeds: 50"]
    assert cards(kind, kind | {column: "1"}) == [bpd]


def test_the_distance_of_other_weights_is_left_out(sweep, read_page):
    path = sweep / "vlb-seed0" / "quality.json"
    quality = {"fid": 3.17, "features": "2048", "num_samples": 50_000, "ema_sha256": "of an earlier step"}
    path.write_text(json.dumps(quality))
    assert "FID (2048)" not in read_page(sweep).of("th")


@pytest.mark.parametrize(
    ("features", "title"), [("pixels", "Fréchet distance (pixels)"), ("inception", "FID (inception)")]
)
def test_only_the_distance_of_inceptions_features_is_called_fid(features, title):
    """Earlier versions wrote both names, whatever the features."""
    scores = {"fid": 3.5, "frechet_distance": 3.5, "features": features}
    assert numbers.distance(scores) == (title, 3.5)


def test_tables_and_plots_of_the_program_are_on_the_page(tmp_path, read_page):
    head = ["variance", "T", "test_bpd", "published"]
    lines = [head, ["<b>", "50", "2.004949630410404", ""], ["β", "50", "nan", "x"]]
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    (tmp_path / "table.md").write_text("# What was found")
    pictures.save_png(tmp_path / "bpd.png", np.zeros((9, 9, 3), np.uint8))
    found = read_page(tmp_path)
    assert 2.004949630410404 in found.numbers and "2.0049" in found.of("data") and "50" in found.of("data")
    assert "<b>" in found.of("th") and "# What was found" in found.of("pre")
    assert [image["alt"] for image in found.all("img")] == ["The plot bpd.png"]


def test_a_half_width_stands_beside_its_number(tmp_path, read_page):
    head = ["variance", "seeds", "test_bpd", "test_bpd_half_width", "lonely_half_width"]
    lines = [head, ["β", "3", "2.25", "0.0123", "7"], ["β̃", "1", "2.5", "nan", "8"]]
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    found = read_page(tmp_path)
    headings = found.of("th")
    assert "test_bpd_half_width" not in headings and "lonely_half_width" in headings
    assert {2.25, 0.0123, 2.5} <= set(found.numbers) and found.text("table").count(" ± 0.0123") == 1
    assert found.text("table").count(" ± ") == 2, "one in the caption; one seed has none"
    assert any("table.csv: mean ± 95% interval" in caption for caption in found.of("caption"))


def test_the_first_numbers_are_means_over_seeds_and_not_the_luckiest_run(sweep, read_page):
    """The run of the lowest bits/dim belongs to the setting with the higher mean."""
    head = ["variance", "T", "seeds", "test_bpd", "test_bpd_half_width", "frechet_distance", "features", "num_samples"]
    lines = [head, ["β", "50", "2", "2.5", "0.3", "9", "pixels", "50"], ["β̃", "50", "3", "2.25", "0.1", "nan", "", ""]]
    with (sweep / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    found = read_page(sweep)
    cards = [name for name in found.of("dt") if "lowest" in name]
    assert cards == [
        "lowest mean bits/dim, 3 seeds: β̃, 50", "lowest mean Fréchet distance (pixels), 2 seeds: β, 50"
    ]  # fmt: skip
    chosen = [[*head, "validation_bpd"], [*lines[1], "2.0"], [*lines[2], "3.0"]]
    with (sweep / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(chosen)
    assert "lowest mean validation bits/dim, 2 seeds: β, 50" in read_page(sweep).of("dt")
    (sweep / "table.csv").write_text("variance,T,seeds,test_bpd\nβ,50,1,2.5\n")
    assert "lowest bits/dim: vlb=1 #seed1" in read_page(sweep).of("dt"), "with one seed each run is its setting"


def test_damage_in_one_run_is_a_line_and_the_others_stay(sweep, read_page):
    (sweep / "vlb-seed0" / "summary.json").write_text('{"test_bpd": 2.')
    found = read_page(sweep)
    lines = [text for around, text in found.texts if around[-3:] == ("main", "ul", "li")]
    assert len(lines) == 1 and lines[0].startswith("vlb-seed0/summary.json is damaged: ")
    assert 2.0 in found.numbers and "runs: 1 finished, 2 begun" in found.text()


def test_the_command_knows_a_sweep_and_makes_the_pages_of_its_runs(sweep, capsys):
    assert not (sweep / "vlb-seed0" / page.NAME).exists()
    assert command.main([str(sweep)]) == 0
    assert capsys.readouterr().out == f"{sweep / page.NAME}\n"
    assert all((sweep / name / page.NAME).exists() for name in ("vlb-seed0", "vlb=1 #seed1", "simple-seed0"))
