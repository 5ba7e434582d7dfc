"""A resumed run's log is the log of a run that never stopped."""

import resource

import numpy as np
import pytest

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
    with MetricsLog(tmp_path, step=10) as log:  # whose row a signal kept from being written
        assert log.last_step == 0
        log.write(10, loss=1.0)
    with MetricsLog(tmp_path, step=10) as log:
        assert log.last_step == 10
        with pytest.raises(ValueError, match="step 10 .* step 10"):
            log.write(10, loss=1.0)
        log.write(11, loss=1.0)
        with pytest.raises(ValueError, match="step 11 .* step 11"):
            log.write(11, loss=1.0)


def test_a_nan_is_refused_by_name_and_not_written(tmp_path):
    with MetricsLog(tmp_path) as log:
        with pytest.raises(ValueError, match="grad_norm is nan"):
            log.write(1, loss=1.0, grad_norm=float("nan"))
    assert read_metrics(tmp_path) == []


def test_a_full_disk_is_a_one_line_error_and_the_rows_before_it_stay(tmp_path):
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


@pytest.mark.parametrize("row", [b'{"st', b'{"step": 2, "lo\xffs": 1.0}'], ids=["cut", "no text"])
def test_a_damaged_row_before_the_last_is_an_error(tmp_path, row):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + row + b'\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 of .*metrics.jsonl is damaged"):
        read_metrics(tmp_path)
