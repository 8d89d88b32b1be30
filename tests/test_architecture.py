"""The house has floors: a package imports from floors below its own alone, and no modules in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import rtlynx

ROOT = Path(rtlynx.__path__[0])
# From the ground up; those in one line do not know each other.
FLOORS = (
    ("math", "storage"),
    ("recipe", "cuda"),
    ("ops",),
    ("nn",),
    ("models",),
    ("calibration",),
    ("io",),
    ("evaluate", "timing"),
    ("cli",),
)
# What only runs where somebody types a command; a server never imports these.
TOOLS = {"evaluate", "timing", "cli"}
HEAVY = {"matplotlib", "jinja2", "torchmetrics", "PIL", "rtlynx_zoo", "transformers"}


def modules():
    """Dotted name -> file, of the whole library."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ("rtlynx", *path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(path):
    """Full names that a file imports, wherever it does so; not those for type checkers alone."""
    tree = ast.parse(path.read_text())
    unseen = {
        node
        for one in ast.walk(tree)
        if isinstance(one, ast.If) and getattr(one.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(one)
    }
    for node in ast.walk(tree):
        if node in unseen:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(name):
    """Modules of the library that module `name` imports."""
    found = set()
    for imported in imports(MODULES[name]):
        while imported not in MODULES and "." in imported:
            imported = imported.rpartition(".")[0]
        if imported.partition(".")[0] == "rtlynx":
            found.add(imported)
    return found - {name}


def floor(name):
    package = name.split(".")[1]
    return next(number for number, packages in enumerate(FLOORS) if package in packages)


HOUSED = [name for name in MODULES if name not in ("rtlynx", "rtlynx._version", "rtlynx.__main__")]


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: own_imports(name) for name in HOUSED}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("name", HOUSED)
def test_a_module_imports_from_floors_below_alone(name):
    for imported in own_imports(name) - {"rtlynx._version"}:
        assert imported != "rtlynx", "import what is needed from where it is"
        same = imported.split(".")[1] == name.split(".")[1]
        assert same or floor(imported) < floor(name), f"{name} imports {imported}, which is not below it"


@pytest.mark.parametrize("name", HOUSED)
def test_what_servers_import_needs_nothing_of_the_tools(name):
    if name.split(".")[1] not in TOOLS and name != "rtlynx.models.pipelines":
        assert not HEAVY & {imported.partition(".")[0] for imported in imports(MODULES[name])}


def test_the_root_holds_what_users_name():
    assert len(list(ROOT.glob("*.py"))) <= 6


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_can_be_read_in_one_go(name):
    source = MODULES[name].read_text()
    assert source.count("\n") <= 500
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, node.name
