"""The house has floors: a package imports from floors below its own alone, and no modules in a circle."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import rtlynx

ROOT = Path(rtlynx.__path__[0])
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
CUDA = sorted([*(ROOT / "cuda" / "sm90").glob("*.cu*"), *BENCHMARKS.glob("*.cu*")])
# From the ground up; those in one line do not know each other.
FLOORS = (
    ("math", "storage", "renaming"),
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


def cuda_functions(source):
    """First line and number of lines of every CUDA function: what braces enclose after a parenthesis."""
    blank = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"", re.DOTALL)
    code = blank.sub(lambda found: re.sub(r"[^\n]", " ", found.group()), source)
    found, scopes = [], []
    for brace in re.finditer(r"[{}]", code):
        if brace.group() == "}":
            is_function, begin = scopes.pop()
            if is_function:
                lines = code.count("\n", begin, brace.start()) + 1
                found.append((source.splitlines()[code.count("\n", 0, begin)].strip(), lines))
            continue
        before = code[: brace.start()]
        # What a head follows: a declaration, a block, a line of the preprocessor.
        text = re.split(r"[;{}]|^[ \t]*#.*$", before, flags=re.MULTILINE)[-1]
        head = text.lstrip()
        is_function = bool(re.search(r"\)[\s\w]*$", head)) and not any(inner for inner, _ in scopes)
        scopes.append((is_function, len(before) - len(head)))
    return found


@pytest.mark.parametrize("path", CUDA, ids=lambda path: path.name)
def test_cuda_functions_can_be_read_in_one_go(path):
    source = path.read_text()
    assert source.count("\n") <= 500
    for head, lines in cuda_functions(source):
        assert lines <= 120, head


LONG_FUNCTION = """
// a { brace in a comment, and "one { in a string"
#define ACC(i) "{" #i
struct Pair {
    float low, high;
    DEVICE float sum() const { return low + high; }
};
constexpr Pair kPair{1.f, 2.f};
template <int N>
DEVICE void fill(float (&values)[N]) {
    auto one = [&](int i) {
        values[i] = 1.f;
    };
BODY}
extern "C" __global__ void __launch_bounds__(128) kernel(const __grid_constant__ Pair p) {
}
"""


def test_the_lines_of_cuda_functions_are_counted():
    body = "    if (N > 0) { one(0); }\n" * 200
    assert cuda_functions(LONG_FUNCTION.replace("BODY", body)) == [
        ("DEVICE float sum() const { return low + high; }", 1),
        ("template <int N>", 206),
        ('extern "C" __global__ void __launch_bounds__(128) kernel(const __grid_constant__ Pair p) {', 2),
    ]


def test_functions_of_the_kernels_are_found():
    found = [head for path in CUDA for head, _ in cuda_functions(path.read_text())]
    for name in ("compress", "gemm", "quantize", "copy_bytes"):
        assert any(f" {name}(const __grid_constant__" in head for head in found)
