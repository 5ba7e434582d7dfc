"""examples/*.ipynb: they run from a fresh clone (slow), what they call exists, and their outputs are in the files."""

import ast
import importlib
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
MAX_BYTES = 500_000
MAX_SECONDS = 180  # of processor time

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def missing_names(code: str) -> list[str]:
    """Names of the library that `code` imports or takes from a module, and that do not exist."""
    tree, modules, missing = ast.parse(code), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "diffusion":
            for alias in node.names:
                try:
                    found = importlib.import_module(f"{node.module}.{alias.name}")
                except ModuleNotFoundError:
                    found = getattr(importlib.import_module(node.module), alias.name, None)
                modules[alias.asname or alias.name] = found
                missing += [alias.name] if found is None else []
    for node in ast.walk(tree):
        of = modules.get(getattr(getattr(node, "value", None), "id", None)) if isinstance(node, ast.Attribute) else None
        if of is not None and not hasattr(of, node.attr):
            missing.append(f"{node.value.id}.{node.attr}")
    return missing


def test_a_name_that_is_gone_is_found():
    imports = "from diffusion import samplers, none\nfrom diffusion.model import Model, No\n"
    code = imports + "samplers.ddim\nsamplers.gone(1)"
    assert missing_names(code) == ["none", "No", "samplers.gone"]


@each
def test_what_it_calls_exists(path):
    assert not missing_names("\n".join(map(source, cells(path, "code"))))


@each
def test_links_lead_somewhere(path):
    text = "\n".join(map(source, cells(path, "markdown")))
    local = [link.partition("#")[0] for link in re.findall(r"\]\(([^()\s]+)\)", text) if "://" not in link]
    assert local and not [link for link in local if not (path.parent / link).is_file()]


@each
def test_it_holds_its_outputs_as_they_came_in_order(path):
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size <= MAX_BYTES


def test_all_begin_with_the_same_set_up():
    assert len(NOTEBOOKS) == 4
    assert len({source(cells(path, "code")[0]) for path in NOTEBOOKS}) == 1


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a machine may be busy
@each
def test_it_runs_from_a_clone(path):
    """Its code cells one after another, as a notebook runs them."""
    code = "\n".join(map(source, cells(path, "code")))
    environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)  # those of tests/conftest.py
    before = seconds_of_children()
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=path.parent, env=environment, check=True)
    assert seconds_of_children() - before <= MAX_SECONDS


def seconds_of_children() -> float:
    """The processor time of processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
