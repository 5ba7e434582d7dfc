"""Loggers: each gets every row of metrics.jsonl once, and none can end the run."""

import functools
import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import numpy as np
import pytest

from diffusion.experiment import config as config_lib
from diffusion.experiment.schema import LOGGERS
from diffusion.reporting import loggers
from diffusion.reporting.metrics_log import Logger, MetricsLog, read_metrics

PICTURE = np.zeros((4, 4, 1), np.uint8)


def test_tensorboard_gets_the_numbers_and_the_pictures(tmp_path):
    with MetricsLog(tmp_path, logger=loggers.tensorboard(tmp_path, 0, {})) as log:
        log.write(1, val_loss=1.0)
        log.images(1, "samples", PICTURE)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"val_loss" in events.read_bytes() and b"samples" in events.read_bytes()


# --- several, of which some fail


def fail(*_):
    raise RuntimeError("no\nnetwork")


@pytest.mark.parametrize("part", ["make", *Logger._fields])
def test_one_that_fails_is_named_once_and_the_others_get_everything(part, tmp_path, caplog):
    got = []
    good = Logger(
        lambda step, row: got.append((step, row)), lambda step, *_: got.append(step), lambda: got.append("closed")
    )

    def bad():
        return Logger(lambda *_: None)._replace(**{part: fail})

    makers = {"bad(project='x')": fail if part == "make" else bad, "good": lambda: good}
    with MetricsLog(tmp_path, logger=loggers.together(makers)) as log:
        for step in (1, 2):
            log.write(step, loss=0.5)
            log.images(step, "samples", PICTURE)
    assert got == [(1, {"loss": 0.5}), 1, (2, {"loss": 0.5}), 2, "closed"]
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    (record,) = caplog.records
    assert record.getMessage() == (
        "the logger bad(project='x') failed (RuntimeError: no network) and gets no more rows; "
        "metrics.jsonl has all rows"
    )


# --- Weights & Biases


class Server:
    """W&B, as far as it is used: a step is complete when the next one comes, or when the run finishes."""

    def __init__(self):
        self.rows, self.pictures, self.begun = {}, [], []

    def module(self, offline: bool) -> SimpleNamespace:
        """What `import wandb` finds."""
        begin = functools.partial(self._begin, offline)
        return SimpleNamespace(init=begin, Settings=dict, Image=np.asarray)

    def _begin(self, offline, id, resume, **given):
        assert resume == "allow"
        self.begun.append((id, given))
        rows = self.rows.setdefault(id, [])
        open_row = []

        def log(row, step):
            if "samples" in row:
                assert not open_row or step == open_row[0][0]
                self.pictures.append(step)
                return
            assert not open_row or step > open_row[0][0]
            finish()
            open_row.append((step, row))

        def finish():
            rows.extend(open_row)
            open_row.clear()

        starting_step = rows[-1][0] + 1 if rows and not offline else 0
        return SimpleNamespace(offline=offline, starting_step=starting_step, log=log, finish=finish)


@pytest.fixture(params=[False, True], ids=["online", "offline"])
def server(request, monkeypatch):
    server = Server()
    monkeypatch.setitem(sys.modules, "wandb", server.module(request.param))
    return server


def write_leg(directory, start, end, kill=False):
    """The rows after `start`, as a leg writes them; one that is killed closes nothing."""
    log = MetricsLog(directory, start, logger=loggers.weights_and_biases(directory, start, {"seed": 0}))
    for step in range(start + 1, end + 1):
        log.write(step, loss=1 / step)
        if step % 2 == 0:
            log.images(step, "samples", PICTURE)
    if not kill:
        log.close()


def rows_of(directory):
    return [(row["step"], {"loss": row["loss"]}) for row in read_metrics(directory)]


def test_a_run_that_is_killed_and_resumed_has_each_row_once_in_one_run(server, tmp_path):
    write_leg(tmp_path, 0, 6, kill=True)
    write_leg(tmp_path, 3, 8, kill=True)
    write_leg(tmp_path, 8, 9)
    write_leg(tmp_path, 9, 10)
    ((name, rows),) = server.rows.items()
    assert rows == rows_of(tmp_path) and [step for step, _ in rows] == list(range(1, 11))
    assert {begun for begun, _ in server.begun} == {name, json.loads((tmp_path / "wandb.json").read_text())["id"]}
    assert server.begun[0][1]["config"] == {"seed": 0} and server.begun[0][1]["dir"] == str(tmp_path)
    assert set(server.pictures) == {2, 4, 6, 8, 10}


@pytest.mark.parametrize("server", [False], indirect=True)
def test_rows_that_never_arrived_are_sent_at_the_next_start(server, tmp_path):
    write_leg(tmp_path, 0, 6)
    (rows,) = server.rows.values()
    del rows[3:]
    write_leg(tmp_path, 6, 7)
    assert rows == rows_of(tmp_path) and len(rows) == 7


def test_where_the_name_of_the_run_is_damaged_all_rows_go_to_a_new_one(server, tmp_path):
    write_leg(tmp_path, 0, 3)
    (tmp_path / "wandb.json").write_text("")
    write_leg(tmp_path, 3, 4)
    assert list(server.rows.values())[-1] == rows_of(tmp_path) and len(server.rows) == 2


def test_a_logger_that_is_chosen_later_gets_the_rows_so_far_and_a_fork_is_a_run_of_its_own(server, tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    write_leg(tmp_path / "old", 0, 4)
    (tmp_path / "new" / "metrics.jsonl").write_text((tmp_path / "old" / "metrics.jsonl").read_text())
    write_leg(tmp_path / "new", 3, 5)
    one, other = server.rows.values()
    assert (one, other) == (rows_of(tmp_path / "old"), rows_of(tmp_path / "new"))
    assert [step for step, _ in other] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("found", [None, ModuleSpec("wandb", None)], ids=["nothing", "a folder"])
def test_a_package_that_is_missing_is_one_line_with_the_extra(found, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(ValueError, match=r"train.loggers has wandb, which needs the package wandb: pip install -e '"):
        loggers.check_installed("wandb")
    loggers.check_installed("tensorboard")


# --- the config key


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("wandb", ("wandb",)),
        ("()", ()),
        ("('tensorboard', 'wandb')", ("tensorboard", "wandb")),
        ("wandb(project='digits')", ("wandb(project='digits')",)),
    ],
)
def test_loggers_on_the_command_line(text, value):
    config = config_lib.from_file("configs/digits.py", {"train.loggers": text})
    config_lib.check(config)
    assert config_lib.from_json(config_lib.to_json(config)).train.loggers == value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("wandb", "must be a tuple of names, or () for none, not 'wandb'"),
        (("tensorbord",), "did you mean tensorboard?"),
        (("wandb", "wandb(project='x')"), "must name each once"),
        (("wandb(step=3)",), "wandb has no argument step, only project, entity"),
        ((3,), "must be one of tensorboard, wandb, not 3"),
    ],
)
def test_what_is_no_tuple_of_loggers_is_one_line(value, words):
    assert words in LOGGERS.problem(value)
