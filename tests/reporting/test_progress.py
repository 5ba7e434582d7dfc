"""Progress on a terminal and in a log file."""

from diffusion.reporting.progress import Progress


def test_progress_in_a_log_file_is_lines_and_few_of_them(capsys):
    with Progress(1000, initial=200, desc="train") as progress:
        for _ in range(800):
            progress.set_postfix({"loss": "0.25"}, refresh=False)
            progress.update(1)
    lines = [line for line in capsys.readouterr().err.replace("\r", "").splitlines() if line.strip()]
    assert len(lines) == 2 and lines[0].startswith("train: 200/1000")
    assert "1000/1000" in lines[-1] and "loss=0.25" in lines[-1] and "step/s" in lines[-1]


def test_other_processes_than_0_show_nothing(capsys, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with Progress(2, desc="train") as progress:
        progress.update(2)
    assert capsys.readouterr().err == ""
