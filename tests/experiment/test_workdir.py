"""Whose a working directory is, who may write into it, and which earlier runs it may hold."""

import json
import multiprocessing
import os
import signal
import socket

import pytest

from configs import digits
from diffusion.experiment import config as config_lib
from diffusion.experiment import workdir


def config(**keys):
    made = digits.get_config()
    with made.unlocked():
        made.update_from_flattened_dict({key.replace("__", "."): value for key, value in keys.items()})
    return made


def test_a_stranger_file_is_no_obstacle_unless_a_run_would_overwrite_it(tmp_path):
    for name in ("slurm-4711.out", "thesis.txt", "config.json.4f1c.tmp"):
        (tmp_path / name).write_text("mine")
    workdir.check(config(), tmp_path)
    (tmp_path / "samples.png").write_text("mine, too")
    with pytest.raises(ValueError, match=r"holds no run \(no config.json\), but samples.png, which a run would over"):
        workdir.check(config(), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_file_is_no_working_directory(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="notes is not a directory"):
        workdir.check(config(), tmp_path / "notes")


@pytest.mark.parametrize("content", ["", '{"seed": 0', "[1, 2]", "\0" * 100])
def test_a_damaged_config_is_one_sentence(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    for read in (lambda: workdir.check(config(), tmp_path), lambda: workdir.read_config(tmp_path)):
        with pytest.raises(ValueError, match="config.json is damaged"):
            read()


def test_a_run_of_an_earlier_version_resumes_unless_a_new_key_would_change_it(tmp_path):
    old = json.loads(config_lib.to_json(config()))
    for key in config_lib.ADDED:
        group, name = key.split(".")
        del old[group][name]
    (tmp_path / "config.json").write_text(json.dumps(old))
    workdir.check(config(), tmp_path)
    with pytest.raises(ValueError, match=r"another config \(train.skip_nonfinite: 0 → 3\)"):
        workdir.check(config(train__skip_nonfinite=3), tmp_path)
    config_lib.check(workdir.read_config(tmp_path))
    workdir.claim(config(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["train"]["skip_nonfinite"] == 0


def test_the_keys_that_were_added_exist_and_their_values_are_allowed():
    assert all(config_lib.KEYS[key].accepts(value) for key, value in config_lib.ADDED.items())


def own(directory, acquired, leave):
    with workdir.owned(config(), directory):
        acquired.set()
        leave.wait(60)


def test_two_runs_in_one_directory_get_one_sentence_and_a_killed_one_leaves_it_free(tmp_path):
    context = multiprocessing.get_context("fork")
    acquired, leave = context.Event(), context.Event()
    owner = context.Process(target=own, args=(tmp_path, acquired, leave))
    owner.start()
    assert acquired.wait(60)
    words = rf"in use by process {owner.pid} on {socket.gethostname()} since \d+-\d+-\d+ \d+:\d+:\d+; wait for it"
    with pytest.raises(ValueError, match=words):
        with workdir.owned(config(), tmp_path):
            pass
    os.kill(owner.pid, signal.SIGKILL)
    owner.join()
    for _ in range(2):  # and whoever leaves leaves it free, too
        with workdir.owned(config(), tmp_path) as directory:
            assert directory == tmp_path
            assert f"process {os.getpid()} on" in (tmp_path / workdir.LOCK).read_text()


def test_a_directory_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        with workdir.owned(config(), tmp_path / "file" / "run"):
            pass
