"""The schema: each key has a default that it allows and a help, and docs/config_keys.md lists them all.

    python tests/experiment/test_schema.py      # writes docs/config_keys.md anew
"""

from pathlib import Path

import pytest

from diffusion.experiment import config as config_lib
from diffusion.experiment import schema
from diffusion.experiment.constraints import Constraint
from diffusion.experiment.names import Choice, Several
from diffusion.networks import NETWORKS
from diffusion.networks.unet import UNet

PAGE = Path(__file__).resolve().parents[2] / "docs" / "config_keys.md"
KEYS = schema.all_keys()
U_NET = {name: key for name, key in KEYS.items() if name.startswith("unet.")}


def page() -> str:
    """docs/config_keys.md as the schema has it."""
    rows = ["| key | default | allowed | may change | meaning |", "|---|---|---|---|---|"]
    for name, key in KEYS.items():
        cells = (f"`{name}`", f"`{key.default!r}`", allowed(key.allowed), key.may_change, key.help)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return INTRODUCTION + "\n".join(rows) + "\n"


def allowed(of: Constraint | Choice | Several) -> str:
    """In words. The functions of a table are not named, so that adding one needs no change of the page."""
    if not isinstance(of, Choice):
        return of.words
    is_of_words = all(value is None for value in of.table.values())
    return ", ".join(of.table) if is_of_words else "a name"


INTRODUCTION = """# Config keys

Set a key as `--config.GROUP.KEY=VALUE`, or in a config file. This page is made from `diffusion/experiment/schema.py`;
`--mode=describe` prints the keys with a config's values. "May change" is between the legs of a run: see
[cifar10.md](cifar10.md#what-a-run-may-change). What a name can be, and its arguments: an unknown one prints them all.

"""


def test_the_page_of_the_keys_is_what_the_schema_says():
    assert PAGE.read_text() == page(), "run python tests/experiment/test_schema.py"


@pytest.mark.parametrize("name", KEYS)
def test_a_key_allows_its_default_and_has_one_line_of_help(name):
    key = KEYS[name]
    assert key.allowed.problem(key.default) is None and key.allowed.problem(key.when_absent) is None
    assert 5 < len(key.help) < 130 and "\n" not in key.help and not key.help.endswith(".")


def test_the_default_config_is_every_key_at_its_default_and_locked():
    config = schema.default_config()
    config_lib.check(config)
    assert config.is_locked
    assert config_lib.flatten(config) == {name: key.default for name, key in (schema.KEYS | U_NET).items()}


def test_the_fields_of_a_network_are_keys_with_the_class_s_defaults_and_words(monkeypatch):
    class Small(UNet):
        """A network.

        Attributes:
            width: of every layer. It may
                be anything.
            unknown: no field.
        """

        width: int = 3

    monkeypatch.setitem(NETWORKS, "small", Small)
    key = schema.all_keys()["small.width"]
    assert (key.default, key.help, key.may_change) == (3, "of every layer", "no")
    assert key.allowed.problem("wide") == "must be an integer, not 'wide'"
    keys = schema.all_keys()
    assert keys["unet.num_groups"].help == "groups of every group normalization"
    assert keys["unet.remat"].free and "unet.out_channels" not in keys and "small.unknown" not in keys
    assert "small.width" not in config_lib.flatten(schema.default_config())


if __name__ == "__main__":
    PAGE.write_text(page())
