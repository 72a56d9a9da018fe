"""The rooms of the package: which may import which, no private names across files, and nothing that is too long."""

import ast
import graphlib
import pathlib

import pytest

import refusal_jax

ROOT = pathlib.Path(refusal_jax.__file__).parent
# From below; a room imports rooms of its own floor and of those beneath. The package's __init__ gathers the public names.
FLOORS = (
    {
        "errors",
        "axes",
        "files",
        "distributed",
        "surrogates",
        "settings",
        "logs",
        "progress",
        "stores",
        "hub",
        "signatures",
    },
    {"edits", "taps"},
    {"models"},
    {"checkpoints"},
    {"chat"},
    {"data", "endpoints"},
    {"directions", "conditions"},
    {"runs"},
    {"judges"},
    {"plan"},
    {"report"},
    {"mechanism", "damage", "training", "export"},
    {"study"},
    {"harness", "terminal", "organism"},
    {"defence", "resistance", "speed"},
    {"audit", "gate", "monitor"},
    {"jobs"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
FILES = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def room_of(name: str) -> str:
    """The room of a file's path or of a module's dotted name below `refusal_jax`."""
    return name.replace("/", ".").removesuffix(".py").split(".")[0]


def imports(tree: ast.Module) -> list[tuple[str, str]]:
    """(module below `refusal_jax`, name) of every import of the package in a file, those inside functions too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            found += [(f"{node.module}.{alias.name}", alias.name) for alias in node.names]
    return [(name.removeprefix("refusal_jax."), last) for name, last in found if name.startswith("refusal_jax.")]


def test_every_room_has_a_floor():
    assert {room_of(name) for name in FILES} - {"__init__"} <= FLOOR.keys()


def test_no_import_goes_up():
    upwards = [
        f"{name} imports {module}"
        for name, tree in FILES.items()
        if room_of(name) != "__init__"
        for module, _ in imports(tree)
        if FLOOR.get(room_of(module), 0) > FLOOR[room_of(name)]
    ]
    assert upwards == []


def test_rooms_have_no_cycle():
    graph: dict[str, set[str]] = {}
    for name, tree in FILES.items():
        rooms = {room_of(module) for module, _ in imports(tree)} & FLOOR.keys()
        graph.setdefault(room_of(name), set()).update(rooms - {room_of(name)})
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_no_private_name_is_used_in_another_file():
    """Neither by import nor as an attribute of an imported module."""
    private = []
    for name, tree in FILES.items():
        modules = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("refusal_jax"):
                modules |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        private += [f"{name}: {path}" for path in modules.values() if path.rpartition(".")[2].startswith("_")]
        private += [
            f"{name}: {modules[node.value.id]}.{node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            if node.value.id in modules and node.attr.startswith("_") and not node.attr.startswith("__")
        ]
    assert private == []


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_are_short(name):
    assert len((ROOT / name).read_text().splitlines()) <= LONGEST_FILE
    functions = [node for node in ast.walk(FILES[name]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {function: length for function, length in lengths.items() if length > LONGEST_FUNCTION} == {}
