"""A resumed run's log is the log of a run that never stopped, and pictures show the pixels given."""

import json
import resource

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion.reporting import metrics_log
from diffusion.reporting.metrics_log import MetricsLog, read_metrics


def write_steps(log: MetricsLog, steps: range) -> None:
    for step in steps:
        log.write(step, loss=1 / step, images_per_s=np.float32(100.0))


def test_a_killed_and_resumed_run_has_the_rows_of_a_run_that_never_stopped(tmp_path):
    with MetricsLog(tmp_path / "whole") as log:
        write_steps(log, range(1, 9))

    with MetricsLog(tmp_path / "killed") as log:
        write_steps(log, range(1, 7))
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as rows:
        rows.write('{"step": 7, "lo')
    assert [row["step"] for row in read_metrics(tmp_path / "killed")] == [1, 2, 3, 4, 5, 6]
    with MetricsLog(tmp_path / "killed", step=4) as log:
        write_steps(log, range(5, 9))

    rows = (tmp_path / "killed" / "metrics.jsonl").read_text()
    assert rows == (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert read_metrics(tmp_path / "killed")[2] == {"step": 3, "loss": 1 / 3, "images_per_s": 100.0}


def test_rows_are_on_disk_when_write_returns(tmp_path):
    with MetricsLog(tmp_path) as log:
        write_steps(log, range(1, 3))
        assert len(read_metrics(tmp_path)) == 2


def test_a_step_cannot_appear_twice(tmp_path):
    with MetricsLog(tmp_path, step=10) as log:
        with pytest.raises(ValueError, match="step 10 .* step 10"):
            log.write(10, loss=1.0)
        log.write(11, loss=1.0)
        with pytest.raises(ValueError, match="step 11 .* step 11"):
            log.write(11, loss=1.0)


def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path):
    with MetricsLog(tmp_path) as log:
        with pytest.raises(ValueError, match="grad_norm is nan"):
            log.write(1, loss=1.0, grad_norm=float("nan"))
    with pytest.raises(ValueError, match="test_bpd is inf"):
        metrics_log.write_json(tmp_path / "summary.json", {"step": 1, "test_bpd": np.float32(np.inf)})
    assert read_metrics(tmp_path) == [] and not (tmp_path / "summary.json").exists()


def test_tensorboard_gets_the_numbers_and_the_pictures(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, test_loss=1.0)
        log.images(1, "samples", np.zeros((4, 4, 1), np.uint8))
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"test_loss" in events.read_bytes() and b"samples" in events.read_bytes()


def test_a_full_disk_is_one_sentence_and_the_rows_before_it_stay(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=r"metrics of step \d+ could not be written to .*metrics.jsonl \(") as raised:
            with MetricsLog(tmp_path) as log:
                resource.setrlimit(resource.RLIMIT_FSIZE, (300, limit[1]))
                for step in range(1, 50):
                    log.write(step, loss=1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    rows = read_metrics(tmp_path)
    assert 3 < len(rows) < 49 and [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert "\n" not in str(raised.value)


def test_a_damaged_row_before_the_last_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 of .*metrics.jsonl is damaged"):
        read_metrics(tmp_path)


def test_the_summary_is_whole_or_the_old_one(tmp_path):
    metrics_log.write_json(
        tmp_path / "summary.json", {"step": 1, "test_bpd": np.float32(0.5), "versions": metrics_log.versions()}
    )
    first = json.loads((tmp_path / "summary.json").read_text())
    assert first["test_bpd"] == 0.5 and first["versions"]["jax"] == jax.__version__
    with pytest.raises(TypeError):
        metrics_log.write_json(tmp_path / "summary.json", {"step": 2, "test_bpd": object()})
    assert json.loads((tmp_path / "summary.json").read_text()) == first
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_the_device_is_named_with_how_many():
    assert metrics_log.device_name() == f"cpu ×{jax.device_count()}"


def test_a_grid_holds_every_pixel_in_reading_order():
    images = np.arange(5 * 2 * 3, dtype=np.uint8).reshape(5, 2, 3, 1) % 17
    grid = metrics_log.image_grid(images, num_levels=17, columns=3)
    factor, margin = 48 // 3, 2
    assert grid.shape == (2 * (2 * factor + margin) + margin, 3 * (3 * factor + margin) + margin, 1)
    for i, image in enumerate(images):
        top = margin + (i // 3) * (2 * factor + margin)
        left = margin + (i % 3) * (3 * factor + margin)
        cell = grid[top : top + 2 * factor, left : left + 3 * factor]
        for dy, dx in [(0, 0), (factor - 1, factor - 1)]:
            assert np.array_equal(cell[dy::factor, dx::factor], np.round(image * 15.9375))


def test_photographs_are_shown_as_they_are(tmp_path):
    photograph = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    metrics_log.save_png(tmp_path / "one.png", metrics_log.image_grid(photograph))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "one.png"))[2:-2, 2:-2], photograph[0])


def test_grey_pictures_stay_grey(tmp_path):
    grid = metrics_log.image_grid(np.full((4, 8, 8, 1), 16, np.uint8), num_levels=17)
    metrics_log.save_png(tmp_path / "grey.png", grid)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grey.png")), grid[:, :, 0])


def test_the_film_has_a_row_per_sample_and_runs_from_left_to_right():
    films = np.broadcast_to(np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1, 1), (2, 3, 64, 64, 1))
    picture = metrics_log.film(films, num_levels=256)
    assert picture[33::66, 33::66, 0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_progress_in_a_log_file_is_lines_and_few_of_them(capsys):
    with metrics_log.Progress(1000, initial=200, desc="train") as bar:
        for _ in range(800):
            bar.advance(1, loss=0.25)
    lines = [line for line in capsys.readouterr().err.replace("\r", "").splitlines() if line.strip()]
    assert len(lines) == 2 and "1000/1000" in lines[-1] and "loss=0.25" in lines[-1]
