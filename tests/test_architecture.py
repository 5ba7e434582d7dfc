"""The floors of diffusion/: imports go down or sideways without a circle, never up."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "diffusion"

FLOORS = {
    "__init__": 0,
    "schedules": 0,
    "gaussian": 0,
    "randomness": 0,
    "convolution": 0,
    "files": 0,
    "unet": 0,
    "process": 1,
    "reverse": 1,
    "learned_schedule": 1,
    "interop": 1,
    "objectives": 2,
    "timesteps": 2,
    "likelihood": 2,
    "estimators": 2,
    "parameterizations": 2,
    "variances": 2,
    "samplers": 2,
    "oracles": 2,
    "ode": 2,
    "empirical": 2,
    "data": 3,
    "optim": 3,
    "state": 3,
    "step": 3,
    "digests": 3,
    "nonfinite": 3,
    "watchdog": 3,
    "preemption": 3,
    "processes": 3,
    "checkpoint": 3,
    "report": 3,
    "plots": 3,
    "config": 4,
    "build": 4,
    "bound": 4,
    "workdir": 4,
    "memory": 4,
    "parallel": 4,
    "train": 5,
    "evaluate": 5,
    "sample": 5,
    "describe": 5,
}


def source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    """diffusion/data/digits.py -> diffusion.data.digits; diffusion/data/__init__.py -> diffusion.data."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source: str, module: str, is_package: bool) -> set[str]:
    """Full dotted names that `source` imports, at any depth of nesting; relative imports are resolved."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join(package + ([base] if base else []))
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def room(module: str) -> str:
    """The room a dotted name of this package belongs to: diffusion.data.digits -> data."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else "__init__"


def arrows() -> dict[str, set[str]]:
    """For each room, the other rooms it imports."""
    graph = {}
    for path in source_files():
        module = module_name(path)
        imported = imported_modules(path.read_text(), module, path.name == "__init__.py")
        rooms = {room(name) for name in imported if name.split(".")[0] == "diffusion"}
        graph.setdefault(room(module), set()).update(rooms - {room(module)})
    return graph


def test_import_walker_sees_every_spelling():
    source = "\n".join(
        [
            "import diffusion.build",
            "from diffusion import train as t, unet",
            "from diffusion.data import digits",
            "from . import report",
            "from .optim import make",
            "def lazily():\n    from diffusion import sample",
        ]
    )
    found = imported_modules(source, "diffusion.checkpoint", is_package=False)
    assert {room(name) for name in found} == {
        "build", "train", "unet", "data", "report", "optim", "sample",
    }  # fmt: skip


def test_every_module_has_a_floor():
    rooms = {module_name(path).split(".")[1] for path in source_files() if path.parent != PACKAGE}
    rooms |= {path.stem for path in source_files() if path.parent == PACKAGE}
    assert rooms <= FLOORS.keys(), f"give a floor to {sorted(rooms - FLOORS.keys())}"


def test_no_import_runs_up():
    upward = [
        f"{importer} (floor {FLOORS[importer]}) imports {imported} (floor {FLOORS[imported]})"
        for importer, targets in arrows().items()
        for imported in targets
        if FLOORS[imported] > FLOORS[importer]
    ]
    assert not upward, upward


def test_no_import_circle():
    graphlib.TopologicalSorter(arrows()).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", source_files(), ids=module_name)
def test_module_conventions(path):
    source = path.read_text()
    assert ast.get_docstring(ast.parse(source)), "every module says in a docstring what lives there"
    assert len(source.splitlines()) <= 300, "a room past 300 lines is two rooms"
    imported = imported_modules(source, module_name(path), path.name == "__init__.py")
    on_top = {"experiments", "benchmarks", "configs", "tests", "main"}
    assert not {name.split(".")[0] for name in imported} & on_top, "nothing imports what is built on it"
    names = {getattr(node, "id", getattr(node, "attr", None)) for node in ast.walk(ast.parse(source))}
    assert path.name == "parallel.py" or "pmap" not in names and "jax.pmap" not in imported, (
        "parallel.py alone names pmap"
    )
