"""README.md: its quickstart runs unchanged, and it stays short. Its links: tests/test_docs.py."""

import importlib
import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_the_quickstart_needs_no_training_and_scores_as_it_says(tiny_data_dir, tmp_path, monkeypatch, capsys):
    """In an empty directory, with the weights that come with the package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", tiny_data_dir)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    # A reader's own code is not as strict as the tests are.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(code, "README.md", "exec"), {})
    numbers = [float(number) for number in re.findall(r"\d+\.?\d*", capsys.readouterr().out)]
    digit, bits_per_dim, mean = numbers[:64], numbers[64:-1], numbers[-1]
    assert len(bits_per_dim) == 4 and all(0 <= pixel <= 16 for pixel in digit)
    assert mean == pytest.approx(sum(bits_per_dim) / 4, abs=1e-4)
    assert mean == pytest.approx(float(re.search(r"# mean: (.+)", code)[1]), abs=1e-3)


def test_it_is_at_most_8_kilobytes():
    assert len(README.encode()) <= 8192


def test_the_tables_of_equations_name_what_exists():
    """`module.function` of the package, or a file or folder in it."""
    section = README.partition("## Where the equations are")[2].partition("\n## ")[0]
    names = [name for line in section.splitlines() if line.startswith("| ") for name in re.findall(r"`(.+?)`", line)]
    assert len(names) > 20
    for name in names:
        if name != "diffusion/" and not (ROOT / "diffusion" / name).exists():
            module, _, attributes = name.partition(".")
            found = importlib.import_module(f"diffusion.{module}")
            for attribute in filter(None, attributes.split(".")):
                found = getattr(found, attribute)
