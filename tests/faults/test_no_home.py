"""Without HOME and an entry in /etc/passwd, as in many containers: only what needs a home asks for one."""

import os
import pwd
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import main
from diffusion.data import tfds
from diffusion.evaluation import classifier, reference
from diffusion.evaluation.reference import Reference
from diffusion.experiment import named_run, workdir
from diffusion.networks import inception
from diffusion.runtime import compiled_programs, files

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def homeless(monkeypatch):
    def unknown(user):
        raise KeyError(f"getpwuid(): uid not found: {user}")

    for name in ("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)
    with pytest.raises(RuntimeError):
        Path("~").expanduser()


def test_programs_are_compiled_without_a_cache(monkeypatch):
    config = SimpleNamespace(jax_compilation_cache_dir=None, update=None)
    monkeypatch.setattr(compiled_programs, "jax", SimpleNamespace(config=config))
    compiled_programs.keep(on_cpu=False)
    assert config.jax_compilation_cache_dir is None


def test_a_reference_is_computed_and_not_kept(caplog):
    made = Reference({}, {}, np.ones((1, 1), np.float32))
    assert reference.cached({"data": "a"}, 1, lambda: made) is made
    assert "set XDG_CACHE_HOME; what is computed of the reference is not kept" in caplog.text


@pytest.mark.parametrize("where", [lambda: classifier.path_of("ab"), inception.published_weights])
def test_what_is_only_found_in_a_cache_is_one_line(where):
    with pytest.raises(FileNotFoundError, match=r"^there is no place for a cache: no home .* set XDG_CACHE_HOME$"):
        where()


@pytest.mark.parametrize("home", [os.devnull, f"{os.devnull}/home"])
def test_a_home_that_cannot_be_entered_is_none(monkeypatch, caplog, home):
    monkeypatch.setenv("HOME", home)
    made = Reference({}, {}, np.ones((1, 1), np.float32))
    assert reference.cached({"data": "a"}, 1, lambda: made) is made
    assert "cannot be reached; set XDG_CACHE_HOME; what is computed of the reference is not kept" in caplog.text


def test_nor_is_the_home_of_another_user(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_directory() == tmp_path / ".cache" / "diffusion"
    (tmp_path / ".cache").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: (Path(path), mode) != (tmp_path / ".cache", os.X_OK))
    with pytest.raises(FileNotFoundError, match=r"cannot be reached; set XDG_CACHE_HOME$"):
        files.cache_directory()


def test_data_lie_where_they_are_said_to_lie(tmp_path):
    assert tfds.resolve_data_dir(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match=r"^data.data_dir='' means ~/tensorflow_datasets, but .*; set data.data_dir$"):
        tfds.resolve_data_dir("")


@pytest.mark.parametrize("path", ["~/runs", "~nobody/runs"])
def test_a_path_in_an_unknown_home_is_one_line(path, capsys):
    for expand in (files.expanded, workdir.parse, lambda path: named_run.parse(path, "init_from")):
        with pytest.raises(ValueError, match=rf"^{path}: no home directory is known .*; write the whole path$"):
            expand(path)
    with pytest.raises(SystemExit) as ended:
        main._parse(["main.py", f"--workdir={path}", "--mode=eval"])
    assert ended.value.code == 2
    assert re.fullmatch(rf"error: {path}: no home directory is known .*\n", capsys.readouterr().err)


def test_the_home_directory_is_asked_for_in_one_place():
    """Or the next caller would raise a RuntimeError again."""
    sources = [ROOT / "main.py", *(ROOT / "diffusion").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    asking = [path.name for path in sources if re.search(r"\.expanduser\(|Path\.home\(", path.read_text())]
    assert asking == ["files.py"]
