"""The order of the folders of diffusion/: each imports only itself and earlier ones, without cycles."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "diffusion"

# The modules directly in diffusion/ are the paper: they know no folder. A folder may know the paper and what comes
# before it here.
PAPER = ""
ORDER = ("runtime", "networks", "interop", "exact", "data", "reporting", "training", "evaluation")
ORDER += ("experiment", "programs")
KNOWS_NOTHING_ELSE = "networks"  # not even the paper
NETWORKS_AND_RUNTIME = "diffusion.networks.inception_weights"  # a file that is downloaded and converted once
SEE_A_CONFIG = ("experiment", "programs")
NAMES_PMAP = "diffusion.training.parallel"
BUILT_ON_IT = {"experiments", "benchmarks", "configs", "examples", "tests", "main"}

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 70
MAX_CODE_LINES = 50  # of a function, without its docstring, comments and empty lines


def module_name(path: Path) -> str:
    """diffusion/data/digits.py -> diffusion.data.digits; diffusion/data/__init__.py -> diffusion.data."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
every_module = pytest.mark.parametrize("module", PATHS)


def repository_files() -> list[Path]:
    folders = ("diffusion", "configs", "experiments", "benchmarks", "examples", "tests")
    nested = [path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")]
    return sorted([*REPOSITORY.glob("*.py"), *nested])


def imported_names(source: str, module: str, is_package: bool) -> set[str]:
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


def names_imported_by(module: str) -> set[str]:
    path = PATHS[module]
    return imported_names(path.read_text(), module, path.name == "__init__.py")


def module_of(name: str) -> str:
    """The module in which a dotted name lies: diffusion.data.source.load -> diffusion.data.source."""
    while name not in PATHS:
        name = name.rpartition(".")[0]
    return name


def modules_imported_by(module: str) -> set[str]:
    """The other modules of diffusion/ that a module imports."""
    inside = {name for name in names_imported_by(module) if name.split(".")[0] == PACKAGE.name}
    return {module_of(name) for name in inside} - {module}


def folder(module: str) -> str:
    """diffusion.data.digits -> data; diffusion.schedules -> PAPER."""
    parts = PATHS[module].relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else PAPER


def may_import(importer: str, imported: str) -> bool:
    """Whether the order of the folders allows that one module imports the other."""
    own, other = folder(importer), folder(imported)
    if own == PAPER:
        return other == PAPER
    if own == KNOWS_NOTHING_ELSE:
        return other == own or importer == NETWORKS_AND_RUNTIME and other == "runtime"
    return other == PAPER or ORDER.index(other) <= ORDER.index(own)


def test_the_walker_sees_every_spelling():
    source = "\n".join(
        [
            "import diffusion.experiment.build",
            "from diffusion import schedules as s, likelihood",
            "from diffusion.data import digits",
            "from diffusion.data.source import load",
            "from . import watchdog",
            "from .files import replacing",
            "from ..training import loop",
            "from .. import process",
            "def lazily():\n    from diffusion.programs import sample",
        ]
    )
    found = {module_of(name) for name in imported_names(source, "diffusion.runtime.checkpoint", is_package=False)}
    assert {name.removeprefix("diffusion.") for name in found} == {
        "experiment.build", "schedules", "likelihood", "data.digits", "data.source", "runtime.watchdog",
        "runtime.files", "training.loop", "process", "programs.sample",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("schedules", "process", True),
        ("schedules", "runtime.files", False),
        ("interop.diffusers", "networks.unet", True),
        ("interop.diffusers", "data.source", False),
        ("networks.unet", "interop.diffusers", False),
        ("model", "networks.unet", False),
        ("networks.unet", "networks.layers", True),
        ("networks.unet", "schedules", False),
        ("networks.unet", "runtime.files", False),
        ("networks.inception_weights", "runtime.files", True),
        ("networks.inception_weights", "schedules", False),
        ("training.loop", "reporting.metrics_log", True),
        ("training.loop", "training.step", True),
        ("training.loop", "evaluation.bound", False),
        ("programs.train", "experiment.build", True),
        ("experiment.build", "programs.train", False),
    ],
)
def test_what_the_order_allows(importer, imported, allowed):
    assert may_import(f"diffusion.{importer}", f"diffusion.{imported}") == allowed


def test_every_folder_has_a_place_in_the_order():
    assert {folder(module) for module in PATHS} == {PAPER, *ORDER}


@every_module
def test_imports_follow_the_order_of_the_folders(module):
    against = [imported for imported in modules_imported_by(module) if not may_import(module, imported)]
    assert not against, f"{module} imports {', '.join(against)}: see ORDER"


def test_no_import_circle():
    graph = {module: modules_imported_by(module) for module in PATHS}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@every_module
def test_only_experiment_and_programs_see_a_config(module):
    imports_it = any(name.split(".")[0] == "ml_collections" for name in names_imported_by(module))
    assert not imports_it or folder(module) in SEE_A_CONFIG


@every_module
def test_nothing_imports_what_is_built_on_it(module):
    assert not {name.split(".")[0] for name in names_imported_by(module)} & BUILT_ON_IT


@every_module
def test_one_module_names_pmap(module):
    nodes = list(ast.walk(ast.parse(PATHS[module].read_text())))
    names = {getattr(node, "id", getattr(node, "attr", None)) for node in nodes}
    assert module == NAMES_PMAP or "pmap" not in names and "jax.pmap" not in names_imported_by(module)


@every_module
def test_a_module_is_short_and_says_what_lives_there(module):
    source = PATHS[module].read_text()
    assert ast.get_docstring(ast.parse(source))
    assert len(source.splitlines()) <= MAX_FILE_LINES


def function_sizes(source: str) -> Iterator[tuple[str, int, int]]:
    """(name, lines with the docstring, lines of code) of every function; a nested one counts in its outer one, too."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = node.body[0]
        docstring = range(first.lineno, first.end_lineno + 1) if ast.get_docstring(node) is not None else ()
        own = range(node.lineno, node.end_lineno + 1)
        text = [lines[number - 1].strip() for number in own if number not in docstring]
        code = [line for line in text if line and not line.startswith("#")]
        yield node.name, len(own), len(code)


def test_function_sizes_are_counted():
    source = 'def f():\n    """One.\n\n    Two.\n    """\n    # why\n\n    def g():\n        pass\n\n    return g\n'
    assert list(function_sizes(source)) == [("f", 11, 4), ("g", 2, 2)]


@every_module
def test_functions_are_short(module):
    sizes = function_sizes(PATHS[module].read_text())
    long = [name for name, total, code in sizes if total > MAX_FUNCTION_LINES or code > MAX_CODE_LINES]
    assert not long, f"{module}: {', '.join(long)}"


def named_lambdas(source: str) -> Iterator[int]:
    """The lines where a lambda is assigned to a name, by =, with an annotation or by :=."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            if isinstance(target, ast.Name):
                pairs = [(target, node.value)]
            elif isinstance(target, ast.Tuple | ast.List) and isinstance(node.value, ast.Tuple | ast.List):
                pairs = zip(target.elts, node.value.elts, strict=False)
            else:
                pairs = []
            if any(isinstance(name, ast.Name) and isinstance(value, ast.Lambda) for name, value in pairs):
                yield node.lineno


def test_every_spelling_of_a_named_lambda_is_found():
    spellings = ["f = lambda: 1", "f: object = lambda: 1", "(f := lambda: 1)", "f, a = lambda: 1, 2"]
    assert sorted(named_lambdas("\n".join(spellings))) == [1, 2, 3, 4]
    assert not list(named_lambdas("table = {1: lambda: 1}\nf(lambda: 1, key=lambda: 2)\ng: int"))


def test_no_lambda_is_assigned_to_a_name():
    found = [
        f"{path.relative_to(REPOSITORY)}:{line}"
        for path in repository_files()
        for line in named_lambdas(path.read_text())
    ]
    assert not found, f"write a def: {', '.join(found)}"


@pytest.mark.parametrize("package", ["diffusion", "experiments", "benchmarks", "configs", "examples"])
def test_what_is_about_to_go_is_an_error_in_our_own_modules_alone(package):
    use = "import warnings; warnings.warn('about to go', DeprecationWarning)"
    exec(use, {"__name__": "numpy.planted"})
    with pytest.raises(DeprecationWarning, match="about to go"):
        exec(use, {"__name__": f"{package}.planted"})
