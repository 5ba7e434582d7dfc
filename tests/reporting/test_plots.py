"""Curves show the given numbers and their sums."""

import numpy as np
import pytest
from matplotlib import pyplot
from PIL import Image

from diffusion.reporting import plots


def test_curves_are_drawn_without_global_state(tmp_path):
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 50)] + [{"step": 50, "val_loss": 2.0}]
    plots.plot_loss(rows, tmp_path / "loss.png")
    plots.plot_loss([], tmp_path / "no_rows.png")
    plots.plot_loss([{"step": 1, "loss": -1.0}], tmp_path / "negative.png")
    terms = 1 / np.arange(1.0, 100.0)
    plots.plot_bpd(tmp_path / "bpd.png", terms, 1.1 * terms, 3e-5, title="digits")
    plots.plot_bpd(tmp_path / "one_step.png", np.ones(1), np.ones(1), 0.0)
    plots.plot_rate_distortion(tmp_path / "rate.png", np.geomspace(2, 1e-3, 99), np.linspace(1, 60, 99), 256, "digits")
    for name in ("loss", "no_rows", "negative", "bpd", "one_step", "rate"):
        picture = np.asarray(Image.open(tmp_path / f"{name}.png"))
        assert picture.min() < 100 < picture.max()
    assert pyplot.get_fignums() == []


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda self, *_, **__: saved.append(self))
    return saved


def test_the_bound_s_curves_and_their_annotation_add_up(tmp_path, figures):
    test, train = np.array([0.5, 0.25, 0.125]), np.array([0.5, 0.125, 0.125])
    plots.plot_bpd(tmp_path / "bpd.png", test, train, 0.0625, title="digits")
    (figure,) = figures
    per_t, cumulative = figure.axes
    texts = [figure.get_suptitle(), *(text.get_text() for text in per_t.get_legend().get_texts())]
    numbers = [text.partition(": ")[2] for text in texts]
    assert numbers == ["0.9375 bits/dim", "", "0.3750", "0.5000", "0.062"]
    curves = [[line.get_xydata().tolist() for line in axes.get_lines()[:3]] for axes in (per_t, cumulative)]
    dot = [[1, 0.5]]
    assert curves[0] == [[[2, 0.125], [3, 0.125]], [[2, 0.25], [3, 0.125]], dot]
    assert curves[1] == [[[1, 0.5], [2, 0.625], [3, 0.75]], [[1, 0.5], [2, 0.75], [3, 0.875]], dot]


def test_the_progressive_curve_runs_from_noise_to_image(tmp_path, figures):
    plots.plot_rate_distortion(tmp_path / "rate.png", np.array([0.75, 0.5, 0.0]), np.array([1.0, 2.0, 4.0]), 17)
    curves = [axes.get_lines()[0].get_xydata().tolist() for axes in figures[0].axes]
    assert curves[0] == [[2, 1], [1, 2], [0, 4]]  # T − t reverse steps
    assert curves[1] == [[2, 0.75], [1, 0.5], [0, 0]]
    assert curves[2] == [[0.75, 1], [0.5, 2], [0, 4]]
    assert "0–16" in figures[0].axes[0].get_ylabel()


def test_schedules_of_any_length_share_one_axis_and_the_first_is_on_top(tmp_path, figures):
    curves = {"learned": np.array([4.0, 0.0, -4.0]), "cosine": np.array([5.0, -5.0])}
    plots.plot_schedules(tmp_path / "schedule.png", curves, title="digits")
    (axes,) = figures[0].axes
    learned, cosine = axes.get_lines()
    np.testing.assert_allclose(learned.get_xydata(), [[1 / 3, 4.0], [2 / 3, 0.0], [1.0, -4.0]])
    np.testing.assert_allclose(cosine.get_xydata(), [[0.5, 5.0], [1.0, -5.0]])
    assert learned.get_zorder() > cosine.get_zorder()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["learned", "cosine"]


def test_the_running_mean_of_the_loss_is_a_mean_of_the_rows_there_are(tmp_path, figures):
    loss = np.random.default_rng(0).uniform(1, 2, 60)
    rows = [{"step": 10 * (i + 1), "loss": value} for i, value in enumerate(loss)] + [{"step": 605, "val_loss": 1.5}]
    plots.plot_loss(rows, tmp_path / "loss.png")
    train, mean, test = figures[0].axes[0].get_lines()
    np.testing.assert_allclose(train.get_xydata(), [[row["step"], row["loss"]] for row in rows[:-1]])
    # Of 60 rows a twentieth, 3: two of them at both ends.
    wanted = [loss[max(0, i - 1) : i + 2].mean() for i in range(60)]
    np.testing.assert_allclose(mean.get_ydata(), wanted)
    np.testing.assert_allclose(test.get_xydata(), [[605, 1.5]])


def test_every_other_metric_has_a_panel_below_the_loss(tmp_path, figures):
    rows = [{"step": 10 * i, "loss": 1.0, "grad_norm": 2.0 * i} for i in (1, 2)]
    plots.plot_loss([*rows, {"step": 21, "val_loss": 1.0, "cost_$": 3.0}], tmp_path / "loss.png")
    loss, *others = figures[0].axes
    assert loss.get_ylabel() == "loss" and [axes.get_title() for axes in others] == ["grad_norm", "cost_$"]
    assert [axes.get_lines()[0].get_xydata().tolist() for axes in others] == [[[10, 2], [20, 4]], [[21, 3]]]
