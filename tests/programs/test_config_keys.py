"""No key of a config is dead: training (which samples and scores), quality, compress and describe read every one."""

import sys
from collections.abc import Iterator

import numpy as np
import pytest
from ml_collections import ConfigDict

from diffusion.experiment import config as config_lib
from diffusion.experiment import rules, schema
from diffusion.programs import compress, describe, quality, train

# Whoever takes all values of a group, to check, compare or print them, reads none of them.
TAKE_ALL = {"items", "iteritems", "values", "itervalues", "to_dict"}


class Reader:
    """Notes which keys of a config are read, by attribute, by item, or by `**` and `dict` of a group."""

    def __init__(self, config: ConfigDict):
        self.read: set[str] = set()
        self._config = config  # kept, so that the groups' ids stay theirs
        self._prefixes = {id(config): ""} | {
            id(group): f"{name}." for name, group in config.items() if isinstance(group, ConfigDict)
        }

    def note(self, group: ConfigDict, key: str) -> None:
        if id(group) in self._prefixes and not TAKE_ALL & set(_callers_in_config_dict()):
            self.read.add(f"{self._prefixes[id(group)]}{key}")


def _callers_in_config_dict() -> Iterator[str]:
    """The methods of ConfigDict through which the value that is being read is asked for."""
    frame = sys._getframe(3)  # behind this generator, `note` and the method that calls it
    while frame and frame.f_globals["__name__"].startswith("ml_collections."):
        yield frame.f_code.co_name
        frame = frame.f_back


@pytest.fixture
def reading(monkeypatch):
    """A function of a config: its reader, from now on."""

    def start(config: ConfigDict) -> Reader:
        reader, get = Reader(config), ConfigDict.__getitem__

        def noted(group, key):
            reader.note(group, key)
            return get(group, key)

        monkeypatch.setattr(ConfigDict, "__getitem__", noted)
        # A rule may look at a key that nothing else reads; the rules have their own tests.
        monkeypatch.setattr(rules, "check", lambda config: None)
        return reader

    return start


def test_every_key_is_read(tiny, reading, tmp_path, capsys):
    few = {"train__num_steps": 1, "train__sample_every": 0, "eval__num_images": 2, "sample__num_images": 2}
    config, of_unet = tiny(quality__num_images=4, **few), tiny(model__network="unet")
    keys = set(config_lib.flatten(config))
    # A config has the keys of the default network alone; another network's are read in the same way.
    assert keys == {key for key in schema.all_keys() if key in schema.KEYS or key.startswith("unet.")}
    readers = [reading(config), reading(of_unet)]
    train.run(config, tmp_path / "run")
    quality.run(config, tmp_path / "run")
    np.save(tmp_path / "image.npy", np.zeros((1, 8, 8, 1), np.uint8))
    compress.run(config, tmp_path / "run", str(tmp_path / "image.npy"), str(tmp_path / "image.ddc"))
    describe.run(config, tmp_path / "run")
    describe.run(of_unet, tmp_path / "other")
    unread = keys - readers[0].read - {key for key in readers[1].read if key.startswith("unet.")}
    assert not unread, f"nobody reads {sorted(unread)}"


def test_a_key_that_nobody_reads_is_found(tiny, reading, capsys):
    config = tiny()
    with config.unlocked():
        config.train.forgotten = 1
        config.unet.given = 2
    reader = reading(config)
    config_lib.differing(config, config)
    config_lib.to_json(config)
    str(config)
    assert not reader.read
    dict(config.get("unet", {}))
    assert config.train.num_steps and config["ema"]["decay"] and config["optim.name"]
    assert "unet.given" in reader.read
    leaves = {key for key in reader.read if key in schema.KEYS}
    assert leaves == {"train.num_steps", "ema.decay", "optim.name"}
    assert "train.forgotten" not in reader.read
