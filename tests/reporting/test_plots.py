"""Curves show the numbers given, and what they add up to."""

import numpy as np
from matplotlib import pyplot
from PIL import Image

from diffusion.reporting import plots


def test_curves_are_drawn_without_global_state(tmp_path):
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 50)] + [{"step": 50, "test_loss": 2.0}]
    plots.plot_loss(rows, tmp_path / "loss.png")
    plots.plot_loss([], tmp_path / "no_rows.png")
    plots.plot_loss([{"step": 1, "loss": -1.0}], tmp_path / "negative.png")
    plots.plot_bpd(tmp_path / "bpd.png", 1 / np.arange(1.0, 100.0), 3e-5, title="digits")
    plots.plot_bpd(tmp_path / "one_step.png", np.ones(1), 0.0)
    plots.plot_rate_distortion(tmp_path / "rate.png", np.geomspace(2, 1e-3, 99), np.linspace(1, 60, 99), 256, "digits")
    for name in ("loss", "no_rows", "negative", "bpd", "one_step", "rate"):
        picture = np.asarray(Image.open(tmp_path / f"{name}.png"))
        assert picture.min() < 100 < picture.max()
    assert pyplot.get_fignums() == []


def test_the_curve_s_annotation_adds_up(tmp_path, monkeypatch):
    texts = []
    monkeypatch.setattr(
        plots.Figure,
        "savefig",
        lambda self, *_, **__: texts.extend(
            [self.get_suptitle()] + [text.get_text() for text in self.axes[0].get_legend().get_texts()]
        ),
    )
    plots.plot_bpd(tmp_path / "bpd.png", np.array([0.5, 0.25, 0.125]), 0.0625, title="digits")
    assert [text.split(": ")[1] for text in texts] == ["0.9375 bits/dim", "0.3750", "0.5000", "0.062"]


def test_the_progressive_curve_runs_from_noise_to_image(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda self, *_, **__: figures.append(self))
    plots.plot_rate_distortion(tmp_path / "rate.png", np.array([0.75, 0.5, 0.0]), np.array([1.0, 2.0, 4.0]), 17)
    curves = [axes.get_lines()[0].get_xydata().tolist() for axes in figures[0].axes]
    assert curves[0] == [[2, 1], [1, 2], [0, 4]]  # T − t reverse steps
    assert curves[1] == [[2, 0.75], [1, 0.5], [0, 0]]
    assert curves[2] == [[0.75, 1], [0.5, 2], [0, 4]]
    assert "0–16" in figures[0].axes[0].get_ylabel()


def test_schedules_of_any_length_share_one_axis_and_the_first_is_on_top(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda self, *_, **__: figures.append(self))
    curves = {"learned": np.array([4.0, 0.0, -4.0]), "cosine": np.array([5.0, -5.0])}
    plots.plot_schedules(tmp_path / "schedule.png", curves, title="digits")
    (axes,) = figures[0].axes
    learned, cosine = axes.get_lines()
    np.testing.assert_allclose(learned.get_xydata(), [[1 / 3, 4.0], [2 / 3, 0.0], [1.0, -4.0]])
    np.testing.assert_allclose(cosine.get_xydata(), [[0.5, 5.0], [1.0, -5.0]])
    assert learned.get_zorder() > cosine.get_zorder()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["learned", "cosine"]


def test_the_running_mean_of_the_loss_is_a_mean_of_the_rows_there_are(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda self, *_, **__: figures.append(self))
    loss = np.random.default_rng(0).uniform(1, 2, 60)
    rows = [{"step": 10 * (i + 1), "loss": value} for i, value in enumerate(loss)] + [{"step": 605, "test_loss": 1.5}]
    plots.plot_loss(rows, tmp_path / "loss.png")
    train, mean, test = figures[0].axes[0].get_lines()
    np.testing.assert_allclose(train.get_xydata(), [[row["step"], row["loss"]] for row in rows[:-1]])
    # Of 60 rows a twentieth, 3: two of them at both ends.
    wanted = [loss[max(0, i - 1) : i + 2].mean() for i in range(60)]
    np.testing.assert_allclose(mean.get_ydata(), wanted)
    np.testing.assert_allclose(test.get_xydata(), [[605, 1.5]])
