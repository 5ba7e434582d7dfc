"""The table of the study of lengths: paired by run, and the keys of each length."""

from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import digits_fixed
from diffusion.evaluation.bound import Bound
from experiments import ema_length


def test_the_table_pairs_the_runs():
    bpd = {("a", 0.0): 2.0, ("b", 0.0): 3.0, ("a", 0.07): 1.9, ("b", 0.07): 2.9}
    steps = {"a": 1000, "b": 2000}
    rows = [{"run": run, "length": n, "step": steps[run], "test_bpd": value} for (run, n), value in bpd.items()]
    lines = ema_length.markdown(rows, ["test"]).splitlines()
    assert lines[0] == "| length | test bits/dim | less ema.decay, by run |"
    assert lines[2].startswith("| ema.decay | 2.5000 ± ") and lines[2].endswith(" | – |")
    assert lines[3].startswith("| 0.07 | 2.4000 ± ") and "| -0.1000" in lines[3]
    assert "n = 2 runs" in lines[-1] and "; step 1,000, 2,000; " in lines[-1]


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """Two runs of the same name whose bits/dim are 1 and 3; only their test splits have images."""
    bpd = {tmp_path / "seed0" / "run": 1.0, tmp_path / "seed1" / "run": 3.0}

    class Run:
        state = SimpleNamespace(step=7)

        def __init__(self, directory):
            self.directory = directory

        def model_with(self, variance):
            return bpd[self.directory]

    def score(bpd, source, numbers):
        return Bound(np.full(2, bpd), *np.zeros((3, 2)))

    config = digits_fixed.get_config()
    config.data.validation, config.ema.post_hoc, config.ema.length = 0, (0.05, 0.1), 0.0
    splits = SimpleNamespace(test=[0, 0], validation=[])
    monkeypatch.setattr(ema_length.workdir, "read_config", lambda directory: config)
    monkeypatch.setattr(ema_length.workdir, "load", lambda directory, **_: Run(directory))
    monkeypatch.setattr(ema_length.build, "load_splits", lambda config: splits)
    monkeypatch.setattr(ema_length.build, "bound_settings", lambda config: None)
    monkeypatch.setattr(ema_length.devices, "replicate", lambda model: model)
    monkeypatch.setattr(ema_length, "for_protocol", lambda model, protocol: {"exact": model}[protocol])
    monkeypatch.setattr(ema_length, "full_bound", lambda settings: score)
    return list(bpd)


def test_runs_of_one_name_in_several_folders_are_all_counted(stored, tmp_path):
    ema_length.run(tmp_path, stored, [0.0, 0.1], ["test"])
    text = (tmp_path / "ema_length.md").read_text()
    assert "| ema.decay | 2.0000 ± " in text and "n = 2 runs" in text


@pytest.mark.parametrize(("lengths", "num_points"), [([0.0], 0), ([0.0, 0.1, 0.2], 2)])
def test_the_plot_has_a_point_for_each_length_and_a_dashed_line(lengths, num_points, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(ema_length.Figure, "savefig", lambda figure, path, dpi: figures.append(figure))
    rows = [{"run": "a", "length": length, "test_bpd": 2.0 + length} for length in lengths]
    ema_length.plot(tmp_path / "plot.png", rows, ["test"])
    (axes,) = figures[0].axes
    *solid, dashed = axes.lines
    assert [len(line.get_xdata()) for line in solid] == [num_points] * (num_points > 0)
    assert dashed.get_linestyle() == "--" and list(dashed.get_ydata()) == [2.0, 2.0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a"]


def test_a_split_without_images_is_one_line(stored, tmp_path):
    with pytest.raises(ValueError, match=r"^--splits: .*run has no validation images \(data.validation=0\)$"):
        ema_length.run(tmp_path, stored, [0.0], ["validation", "test"])


@pytest.mark.parametrize("length", [0.5, 0.289, -0.1])
def test_a_length_that_no_average_has_is_refused_before_anything_is_scored(length, stored, tmp_path, monkeypatch):
    monkeypatch.setattr(ema_length, "scores", None)
    with pytest.raises(ValueError, match=rf"run: config key ema.length must be 0 or .*, not {length}$"):
        ema_length.run(tmp_path / "new", stored, [0.0, length], ["test"])
    assert not (tmp_path / "new").exists()


def test_a_run_without_kept_averages_is_refused_before_anything_is_scored(stored, tmp_path, monkeypatch):
    config = ema_length.workdir.read_config(stored[0])
    config.ema.post_hoc = ()
    monkeypatch.setattr(ema_length, "scores", None)
    with pytest.raises(ValueError, match=r"run: ema.length=0.1 is composed of averages .* does not keep$"):
        ema_length.run(tmp_path / "new", stored, [0.0, 0.1], ["test"])


def test_a_length_changes_nothing_else_of_a_config():
    config = ConfigDict({"ema": {"decay": 0.9, "length": 0.0}}).lock()
    assert ema_length.with_length(config, 0.07).to_dict() == {"ema": {"decay": 0.9, "length": 0.07}}
    assert config.ema.length == 0
