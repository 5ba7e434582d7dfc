"""Configs in files: JSON and back, other versions, and unreadable config files."""

import json
import re
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

import diffusion
import main
from configs import cifar10, digits
from diffusion.experiment import config as config_lib
from diffusion.experiment.schema import KEYS

ROOT = Path(__file__).parents[2]


def changed(**keys):
    config = cifar10.get_config()
    with config.unlocked():
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in keys.items()})
    return config


def test_json_gives_the_config_back_with_its_tuples():
    config = changed(unet__channel_mult=(1, 2), unet__fourier_features=())
    again = config_lib.from_json(config_lib.to_json(config))
    assert config_lib.flatten(again) == config_lib.flatten(config) and again.is_locked
    config_lib.check(again)
    assert config_lib.differing(again, config) == []


def test_json_says_the_version_which_is_no_key():
    text = config_lib.to_json(changed())
    assert json.loads(text)["version"] == diffusion.__version__
    assert config_lib.from_json(text.replace(f'"{diffusion.__version__}"', '"9.0"')) == config_lib.from_json(text)
    groups = json.loads(text)
    del groups["version"]
    assert config_lib.from_json(json.dumps(groups)) == config_lib.from_json(text)


def test_a_run_from_before_a_key_existed_does_what_the_program_did_then(monkeypatch):
    older = json.loads(config_lib.to_json(changed()))
    del older["train"]["monitor_images"], older["seed"]
    again = config_lib.from_json(json.dumps(older))
    config_lib.check(again)
    assert again == changed() and again.is_locked
    monkeypatch.setitem(KEYS, "train.monitor_images", KEYS["train.monitor_images"]._replace(before=7))
    again = config_lib.from_json(json.dumps(older))
    assert (again.train.monitor_images, config_lib.completed(changed()).train.monitor_images) == (7, 256)
    assert config_lib.differing(changed(), again) == ["train.monitor_images: 7 → 256"]


@pytest.mark.parametrize(("version", "words"), [({"version": "9.0"}, "version 9.0"), ({}, "an earlier version")])
def test_a_key_of_another_version_is_one_line(version, words):
    groups = json.loads(changed().to_json()) | version
    groups["train"]["later"] = 1
    here = f"has the config key train.later, which version {diffusion.__version__} does not have; {words} wrote it"
    with pytest.raises(ValueError, match=re.escape(here)):
        config_lib.from_json(json.dumps(groups))


@pytest.mark.parametrize("text", ["", '{"seed": 0', "[1, 2]", "3", "null"])
def test_what_is_not_the_json_of_a_config_is_refused(text):
    with pytest.raises(ValueError, match="is damaged: it is not the JSON of a config"):
        config_lib.from_json(text)


def test_a_file_is_resolved_as_the_command_line_does_it():
    found = config_lib.from_file("configs/digits.py", {"unet.channel_mult": "(1, 2, 2)", "optim.learning_rate": "1e-3"})
    wanted = digits.get_config()
    with wanted.unlocked():
        wanted.unet.channel_mult, wanted.optim.learning_rate = (1, 2, 2), 1e-3
    assert found.to_dict() == wanted.to_dict()


@pytest.mark.parametrize(
    ("path", "overrides", "words"),
    [
        ("configs/none.py", {}, "configs/none.py"),
        ("configs/digits.py", {"unet.chanels": "3"}, "did you mean unet.channels?"),
        ("configs/digits.py", {"unet.channels": "many"}, "many"),
    ],
)
def test_a_file_that_cannot_be_resolved_is_an_error_that_says_why(path, overrides, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        config_lib.from_file(path, overrides)


def test_a_key_of_a_network_that_the_config_has_no_keys_of_says_how_it_is_set(capsys, parsed):
    words = 'config key adm.channels: the config has no keys of adm; model.network="adm(channels=…)" sets a field'
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        config_lib.from_file("configs/digits.py", {"seed": "3", "adm.channels": "32"})
    with pytest.raises(SystemExit):
        parsed("--config=configs/digits.py", "--config.seed=3", "--config.adm.channels=32")
    assert capsys.readouterr().err.startswith(f"error: {words}")


# --- a file of the user's that fails

IMPORT = "from configs import digits\n"


@pytest.fixture
def parsed(monkeypatch):
    """(flags) -> what main.py makes of them."""
    given = flags.FlagValues()
    monkeypatch.setattr(main.flags, "FLAGS", given)

    def parse(*arguments):
        argv = ["main.py", *arguments]
        if "config" not in given:
            config_flags.DEFINE_config_file("config", flag_values=given, sys_argv=argv)
        return main._parse(argv)

    return parse


FAILING = {
    "syntax": ("def get_config():\n    return 1 +\n", "line 2: SyntaxError: invalid syntax"),
    "encoding": ("x = '\xff'\n", "line 1: SyntaxError: (unicode error) 'utf-8' codec can't decode byte 0xff"),
    "name": ("def get_config():\n    return conifg\n", "line 2: NameError: name 'conifg' is not defined"),
    "zero": ("def get_config():\n    x = 0\n    return 1 / x\n", "line 3: ZeroDivisionError: division by zero"),
    "key": (
        f"{IMPORT}def get_config():\n    config = digits.get_config()\n    config.trian = 3\n    return config\n",
        "line 4: AttributeError: 'Key \"trian\" does not exist",
    ),
    "module": ("\nimport nonexistent_module\n", "line 2: ModuleNotFoundError: No module named 'nonexistent_module'"),
}


@pytest.mark.parametrize("kind", FAILING)
def test_a_config_file_that_fails_is_one_line_with_its_place(kind, tmp_path, capsys, parsed):
    text, words = FAILING[kind]
    path = tmp_path / "mine.py"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError) as error:
        config_lib.from_file(str(path), {})
    assert str(error.value).startswith(f"--config={path}, {words}")
    for arguments in ([f"--config={path}"], ["--config", str(path)]):
        with pytest.raises(SystemExit) as ended:
            parsed(*arguments)
        line = capsys.readouterr().err
        assert ended.value.code == 2 and line.startswith(f"error: --config={path}, ") and line.count("\n") == 1


@pytest.mark.parametrize("contents", ["x = 1\n".encode("utf-16"), b"x = 1\0\n"], ids=["utf-16", "nul"])
def test_a_config_file_that_python_cannot_begin_to_read_is_one_line(contents, tmp_path, capsys, parsed):
    path = tmp_path / "mine.py"
    path.write_bytes(contents)
    with pytest.raises(SystemExit):
        parsed(f"--config={path}")
    line = capsys.readouterr().err
    assert line.startswith(f"error: --config={path}: ") and line.endswith("it must be Python in UTF-8\n")
    assert line.count("\n") == 1


def test_there_must_be_a_get_config_that_returns_a_config(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # where ml_collections keeps the last one
    path = tmp_path / "mine.py"
    path.write_text("")
    with pytest.raises(ValueError, match="has no attribute 'get_config'"):
        config_lib.from_file(str(path), {})
    path.write_text("def get_config():\n    return {'seed': 3}\n")
    with pytest.raises(ValueError, match=r"must return a ConfigDict, not \{'seed': 3\}"):
        config_lib.from_file(str(path), {})
