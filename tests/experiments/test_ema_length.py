"""The table of the study of lengths: paired by run, and the keys of each length."""

from ml_collections import ConfigDict

from experiments import ema_length


def test_the_table_pairs_the_runs():
    bpd = {("a", 0.0): 2.0, ("b", 0.0): 3.0, ("a", 0.07): 1.9, ("b", 0.07): 2.9}
    rows = [{"run": run, "length": length, "test_bpd": value} for (run, length), value in bpd.items()]
    lines = ema_length.markdown(rows, ["test"]).splitlines()
    assert lines[0] == "| length | test bits/dim | less ema.decay, by run |"
    assert lines[2].startswith("| ema.decay | 2.5000 ± ") and lines[2].endswith(" | – |")
    assert lines[3].startswith("| 0.07 | 2.4000 ± ") and "| -0.1000" in lines[3]
    assert "n = 2 runs" in lines[-1]


def test_a_length_changes_nothing_else_of_a_config():
    config = ConfigDict({"ema": {"decay": 0.9, "length": 0.0}}).lock()
    assert ema_length.with_length(config, 0.07).to_dict() == {"ema": {"decay": 0.9, "length": 0.07}}
    assert config.ema.length == 0
