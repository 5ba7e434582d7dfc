"""The page of a run: it shows the contents of its files, and they cannot run code."""

import base64
import io
import json
import shlex

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import digits_fixed
from diffusion.experiment import config as config_lib
from diffusion.experiment import workdir
from diffusion.reporting import page, pictures
from diffusion.reporting.page import __main__ as command
from diffusion.reporting.page.run import MAX_BYTES, MAX_PLOT_BYTES, MAX_SMALL_BYTES, MAX_TRAJECTORY_BYTES, PLOTS

SECTIONS = ["samples", "trajectory", "bound", "quality", "curves", "config", "versions"]


def leaves(value):
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list) else [value]


def pixels_of(uri):
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)))


def sections(found):
    return [attributes["id"] for attributes in found.all("section")]


def notes(found):
    """The lines about files that could not be read."""
    is_there = any(attributes.get("class") == "problems" for attributes in found.all("ul"))
    return [text for around, text in found.texts if around[-3:] == ("main", "ul", "li")] if is_there else []


def test_a_run_that_stopped_early_says_so(run_directory, read_page):
    summary = json.loads((run_directory / "summary.json").read_text())
    stopped = {"validations": 5, "lowest_val_loss": 1.5, "lowest_at_step": 20}
    (run_directory / "summary.json").write_text(json.dumps(summary | {"step": 40, "stopped_early": stopped}))
    assert "stopped early at step 40, after 5 validations without a lower val_loss" in read_page(run_directory).text()


def test_the_page_of_a_trained_run_says_what_its_files_say(straight, read_page, tmp_path):
    found = read_page(straight)
    assert sections(found) == [name for name in SECTIONS if name != "quality"] + ["missing"]
    assert notes(found) == []
    summary = json.loads((straight / "summary.json").read_text())
    shown = found.numbers
    for name in ("test_bpd", "test_bpd_stderr", "test_decoder_bpd", "test_kl_bpd", "prior_bpd", "train_bpd",
                 "test_distortion_rmse", "train_rate_bpd", "seconds"):  # fmt: skip
        assert summary[name] in shown, name
    assert {value for value in summary["test_bpd_by_class"] if value is not None} <= set(shown)
    text = found.text()
    assert f"{summary['test_bpd']:.4f} ± {summary['test_bpd_stderr']:.4f}" in text
    for name in ("params_sha256", "ema_sha256", "device"):
        assert summary[name] in text
    assert summary["versions"]["jax"] in text and "finished at step 6" in text
    assert json.dumps(summary, indent=2, ensure_ascii=False) in found.of("pre")
    assert "quality.json" in found.text("section").rpartition("Not there yet")[2]
    for name in ("samples.png", "progressive.png", "loss.png", "bpd.png", "rate_distortion.png"):
        picture = np.asarray(Image.open(straight / name))
        assert any(np.array_equal(pixels_of(image["src"]), picture) for image in found.all("img")), name


def test_every_number_of_every_file_is_there(run_directory, read_page):
    found = read_page(run_directory)
    assert sections(found) == SECTIONS and notes(found) == []
    scores = json.loads((run_directory / "quality.json").read_text())
    for name in ("frechet_distance", "frechet_distance_test_split", "kid", "kid_std",
                 "frechet_equal_n", "frechet_equal_n_stderr", "frechet_equal_n_test_split"):  # fmt: skip
        assert scores[name] in found.numbers, name
    assert 2.5 in found.numbers, "the bits/dim of an evaluation"
    assert "0.0123 ± 0.0004" in found.text() and "40.5 ± 0.25" in found.text()
    assert "Fréchet distance (pixels), 200 samples" in found.of("dt")
    for words in ("of few images", "method: ancestral, num_steps: 6", "step60-ho2020-learned_range-all-299images"):
        assert words in found.text()
    assert "0:02:28" in found.text()
    assert [image["alt"] for image in found.all("img") if image["class"] == "plot"] == list(PLOTS.values())


def test_other_likelihoods_have_tables_of_their_own(run_directory, read_page):
    """A density in the bound's table would look like a bound; each is there with its errors and what it is of."""
    path = run_directory / "summary.json"
    own = {"test_importance_bpd": 1.90625, "test_importance_bpd_stderr": 0.03125, "test_importance_ess": 12.5}
    protocol = {"importance_protocol": {"estimator": "64 trajectories", "name": "exact"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own | protocol))
    density = {"test_ode_density_bpd": 2.15625, "test_ode_density_bpd_stderr": 0.0625, "test_ode_steps": 17.5}
    (run_directory / "evaluations" / "step60-ode").mkdir()
    (run_directory / "evaluations" / "step60-ode" / "ode.json").write_text(
        json.dumps(density | {"protocol": {"dequantization": "uniform"}})
    )
    found = read_page(run_directory)
    assert sections(found) == [*SECTIONS[:3], "likelihoods", *SECTIONS[3:]]
    before, _, others = found.text().rpartition("Other likelihoods")  # the first is a link
    bound = before.rpartition("Bits per dimension")[2]
    assert "prior" in bound
    for words in ("1.9062 ± 0.0312", "the run's summary", "64 trajectories", "2.1562 ± 0.0625", "step60-ode"):
        assert words in others and words not in bound, words
    assert "importance" not in bound and "the two cannot be compared" in others


def test_the_quality_of_earlier_versions_is_read(run_directory, read_page):
    """They wrote FID's names whatever the features, and called standard deviations stderr."""
    path = run_directory / "quality.json"
    old = {"fid": 33.5, "frechet_distance": 33.5, "fid_infinity": 31.25, "fid_infinity_stderr": 0.75,
           "kid": 0.0123, "kid_stderr": 0.0004, "features": "pixels", "num_samples": 200}  # fmt: skip
    path.write_text(json.dumps(old))
    found = read_page(run_directory)
    assert "0.0123 ± 0.0004" in found.text() and "31.25 ± 0.75" in found.text() and 33.5 in found.numbers
    assert "FID" not in found.text("section") and "Fréchet distance, extrapolated to" in found.text("section")
    path.write_text(json.dumps(old | {"features": "inception"}))
    assert "FID, extrapolated to infinitely many samples" in read_page(run_directory).text("section")


def test_bits_given_the_labels_are_called_so(run_directory, read_page):
    """They leave out what the labels cost, so beside another model's they would look too good."""
    path = run_directory / "summary.json"
    summary = json.loads(path.read_text())
    assert "bits/dim, 299 test images" in read_page(run_directory).of("dt")
    with_label = {"label_bpd": 0.0519, "test_with_label_bpd": summary["test_bpd"] + 0.0519}
    path.write_text(json.dumps(summary | with_label | {"protocol": summary["protocol"] | {"labels": "given"}}))
    found = read_page(run_directory)
    assert "bits/dim, 299 test images, labels given" in found.of("dt")
    assert f"{with_label['test_with_label_bpd']:.4f}" in found.text() and "bits/dim with the label" in found.text()


def test_the_quality_of_other_weights_is_called_so(run_directory, read_page):
    path, words = run_directory / "quality.json", "quality.json is of other weights than the bits/dim"
    quality = json.loads(path.read_text())
    for ema_sha256, is_other in (("ef" * 32, True), ("cd" * 32, False)):
        path.write_text(json.dumps(quality | {"ema_sha256": ema_sha256}))
        assert notes(read_page(run_directory)) == [words] * is_other


def test_the_same_files_make_the_same_page(run_directory):
    before = page.write(run_directory).read_bytes()
    assert page.write(run_directory).read_bytes() == before


def test_text_from_files_stays_text(run_directory, make_run, read_page):
    attack = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&lt;"
    (run_directory / "evaluations" / 'a"><img src=x>').mkdir()
    (run_directory / "evaluations" / 'a"><img src=x>' / "eval.json").write_text("{}")
    for name in ("summary", "quality", "config", "base"):
        path = run_directory / f"{name}.json"
        hostile = json.loads(path.read_text(), object_hook=lambda group: group | {attack: attack})
        for key in ("features", "note", "device", "reference", "config"):
            if key in hostile:
                hostile[key] = attack
        path.write_text(json.dumps(hostile))
    (run_directory / "metrics.jsonl").write_text(json.dumps({"step": 1, attack: 1.0, "loss": 2.0}) + "\n")
    found = read_page(run_directory)  # which allows one script and no handlers
    assert found.text().count(attack) > 5
    assert not [attributes for attributes in found.all("img") if attributes["src"] == "x"]


def test_an_unfinished_run_has_a_page_and_it_says_so(tmp_path, read_page, make_run):
    directory = make_run(tmp_path / "run")
    for path in directory.iterdir():
        if path.is_file() and path.name not in ("config.json", "metrics.jsonl", "samples_20.png"):
            path.unlink()
    found = read_page(directory)
    assert "unfinished: step 61 of 60" in found.text() and notes(found) == []
    assert "loss at step 61" in found.of("dt") and 5 / 60 in found.numbers
    missing = [text.partition(":")[0] for text in found.of("p")]
    assert [name for name in missing if " " not in name and name] == ["summary.json", "samples.png", "quality.json"]
    (directory / "metrics.jsonl").unlink()
    assert "not trained yet" in read_page(directory).text()


FILES = ["config.json", "base.json", "summary.json", "quality.json", "eval.json", "metrics.jsonl", "samples.png",
         "samples_20.png", "progressive.png", "bpd.png"]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_half_written_file_is_one_line_on_the_page(name, run_directory, read_page):
    whole = read_page(run_directory)
    path = run_directory / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] + b"\n{}\n" * (name == "metrics.jsonl"))
    (line,) = notes(read_page(run_directory))
    assert line.startswith(f"{name} is damaged: ")
    assert len(line) < 300 and "\n" not in line
    assert len(read_page(run_directory).elements) > len(whole.elements) / 3, "the rest is still there"


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_not_called_damaged(name, run_directory, read_page):
    (run_directory / name).unlink()
    (run_directory / name).mkdir()
    (line,) = notes(read_page(run_directory))
    assert line.startswith(f"{name} could not be read: ")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats() | st.text(max_size=5),
    lambda items: st.lists(items, max_size=3) | st.dictionaries(st.text(max_size=5), items, max_size=3),
    max_leaves=5,
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_json_makes_a_page(data, run_directory, read_page):
    """Whatever the values are, the page is well-formed, and no file is read wrongly enough to stop it."""
    name = data.draw(st.sampled_from(["summary", "quality", "config", "base", "eval", "metrics"]))
    path = run_directory / f"{name}.json"
    if name == "metrics":
        row = {"step": 1} | data.draw(st.dictionaries(st.sampled_from(["step", "loss", "val_loss", "x"]), VALUES))
        (run_directory / "metrics.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    else:
        before = json.loads(path.read_text())
        changed = data.draw(st.dictionaries(st.sampled_from([*before, "new", "test_new"]), VALUES, min_size=1))
        path.write_text(json.dumps(before | changed))
    read_page(run_directory)
    if name != "metrics":
        path.write_text(json.dumps(before))


def test_the_command_on_the_page_makes_the_same_config(tmp_path, read_page):
    """The keys that differ, read off the page and given to the config file again, are the run's config."""
    config = digits_fixed.get_config()
    changes = {
        "unet.channel_mult": (1, 2, 2), "unet.attention_resolutions": (), "optim.learning_rate": 1e-3, "seed": 3,
        "data.flip": True, "schedule.name": "linear(beta_end=0.03)", "init_from": "a 'b' c",
    }  # fmt: skip
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    workdir.claim(config, tmp_path)
    workdir.save_base(tmp_path, "configs/digits_fixed.py")
    found = read_page(tmp_path)
    line = next(text for text in found.of("pre") if text.startswith("python main.py"))
    assert set(found.of("th")) >= changes.keys() - {"seed", "init_from"}
    arguments = dict(part.removeprefix("--").split("=", 1) for part in shlex.split(line.replace("\\\n", " "))[2:])
    base, directory = arguments.pop("config"), arguments.pop("workdir")
    overrides = {key.removeprefix("config."): value for key, value in arguments.items()}
    assert overrides.keys() == changes.keys() and directory == str(tmp_path)
    assert config_lib.from_file(base, overrides).to_dict() == config.to_dict()


def test_a_run_without_its_base_says_so(run_directory, read_page):
    (run_directory / "base.json").unlink()
    assert f"python main.py --workdir={run_directory}" in read_page(run_directory).text()


def test_samples_with_labels_are_said_to_have_a_row_per_class(tmp_path, make_run, read_page):
    captions = {"The first samples": False, "The first samples, a row per class": True}
    for caption, is_conditional in captions.items():
        directory = make_run(tmp_path / str(is_conditional), model={"conditional": is_conditional})
        assert caption in read_page(directory).of("figcaption")


def test_large_pictures_are_shrunk_until_the_page_has_its_weight(run_directory, read_page):
    noise = np.random.default_rng(0).integers(0, 256, (800, 900, 3)).astype(np.uint8)  # 2.2 MB as PNG
    pictures.save_png(run_directory / "samples.png", noise)
    for name in ("progressive.png", "bpd.png", *(f"samples_{10 * i}.png" for i in range(1, 21))):
        pictures.save_png(run_directory / name, noise[:, :450])
    found = read_page(run_directory)
    sizes = {image["alt"]: len(image["src"]) * 3 / 4 for image in found.all("img")}
    assert 2**18 < sizes["Samples of the model, side by side"] <= 2**21 and 2**16 < sizes[PLOTS["bpd.png"]] <= 2**19
    earlier = [alt for alt in sizes if alt.startswith("Samples at step")]
    assert len(earlier) == 8 and {earlier[0], earlier[-1]} == {"Samples at step 10", "Samples at step 200"}
    assert all(2**15 < sizes[alt] <= 2**18 for alt in earlier)
    pictures_bytes = MAX_BYTES + MAX_TRAJECTORY_BYTES + len(PLOTS) * MAX_PLOT_BYTES + 8 * MAX_SMALL_BYTES
    assert pictures_bytes * 4 / 3 < 11_500_000, "of 12 MB; the rest is text"


def test_a_directory_that_holds_nothing_is_a_one_line_error(tmp_path, capsys):
    for directory in (tmp_path, tmp_path / "none"):
        assert command.main([str(directory)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {directory} holds no run (no config.json)")
        assert not (directory / "report.html").exists()


def test_the_command_says_where_the_page_is(run_directory, capsys):
    assert command.main([str(run_directory)]) == 0
    assert capsys.readouterr().out == f"{run_directory / 'report.html'}\n"


def test_a_page_that_cannot_be_written_is_a_warning_of_a_finished_program(run_directory, monkeypatch, capsys):
    (run_directory / "report.html").write_text("before")

    def full(path, text):
        raise OSError(f"{path} could not be written (No space left on device)")

    monkeypatch.setattr(page.files, "write_text", full)
    page.refresh(run_directory)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {run_directory / 'report.html'} was not made (OSError: ")
    assert (run_directory / "report.html").read_text() == "before"
    monkeypatch.setattr(page.run, "page", lambda contents: 1 / 0)
    page.refresh(run_directory)
    assert "(ZeroDivisionError: division by zero); all else is saved" in capsys.readouterr().err
