"""The weights that come with the package: found, undamaged, and described by their cards; tests/programs/test_readme.py
scores images with them."""

import re
from pathlib import Path

import pytest

from diffusion.experiment import export, pretrained

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", pretrained.names())
def test_the_card_says_what_the_files_say(name):
    directory = pretrained.WEIGHTS / name
    about = export.read(directory)
    params = export.read_params(directory, about)  # raises if they have another digest
    card, said = (directory / "README.md").read_text(), (directory / export.ABOUT).read_text()
    assert about.ema_sha256 in card and f"{sum(leaf.size for leaf in params.values()):,} parameters" in card
    scores = re.findall(r'"(test|train|validation)_bpd(_stderr)?": ([\d.]+)', said)
    bpd = {split + error: f"{float(value):.3f}" for split, error, value in scores}
    for split in ("test", "train", "validation"):
        assert f"{bpd[split]} ± {bpd[f'{split}_stderr']}" in card
    assert re.search(r'"command": "(.+)"', said)[1] in card and '"license": "Apache-2.0"' in said


def test_another_name_is_refused_with_those_that_exist(monkeypatch, tmp_path):
    assert "digits" in pretrained.names()
    known = ", ".join(pretrained.names())
    for name in ("digit", "", ".", "../weights/digits"):
        with pytest.raises(ValueError, match=rf"^there are no weights named '{name}'; the package has: {known}$"):
            pretrained.load(name)
    monkeypatch.setattr(pretrained, "WEIGHTS", tmp_path)
    with pytest.raises(ValueError, match=f"'digits'.*: none: {tmp_path} is empty, so install the package again"):
        pretrained.load("digits")


def test_an_installed_package_has_them():
    """As setup.py says: a pattern below diffusion/."""
    (patterns,) = re.findall(r'package_data=\{"diffusion": \[(.+?)\]', (ROOT / "setup.py").read_text())
    matched = {path for pattern in re.findall(r'"(.+?)"', patterns) for path in (ROOT / "diffusion").glob(pattern)}
    assert {pretrained.WEIGHTS / "digits" / name for name in (export.WEIGHTS, export.ABOUT)} <= matched
