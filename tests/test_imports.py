"""Imports point one way, from room to room, and in no circle.

Every import statement counts: those in functions and those for type checkers too.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A file imports from its own room, and from rooms on lower floors. A folder is a room, with all its
# files; so is a file at the root.
FLOORS = (
    {"zeroth_order", "templates", "metrics", "utils"},
    {"hizoo", "error_broadcast", "tasks"},
    {"forward_only", "language_model", "task_data"},
    {"training"},
    {"trainer", "command_line"},
    {"experiment", "sweeps"},
    {"run", "sweep", "report", "replay", "probe"},
)
# Scripts that import from the rooms, and that no room imports from.
BESIDE = {"benchmarks", "data", "docs", "examples", "tests"}

Imports = dict[str, set[str]]


def modules_below(root: Path) -> dict[str, Path]:
    """The product's files by the names that they are imported by."""
    folders = {path.parent for path in root.glob("*/*.py")} - {root / name for name in BESIDE}
    files = [*root.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    names = {path: ".".join(path.relative_to(root).with_suffix("").parts) for path in files}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def imported_names(path: Path, name: str) -> set[str]:
    """What a file's import statements name, in full: modules, and what is taken from them."""
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def imports_below(root: Path) -> Imports:
    """For each of the product's modules, those of the project that it imports."""
    modules = modules_below(root)
    own = {name.partition(".")[0] for name in modules}.union(BESIDE, *FLOORS)
    graph: Imports = {}
    for importer, path in modules.items():
        graph[importer] = set()
        for name in imported_names(path, importer):
            if name.partition(".")[0] in own:
                # What is taken from a module is a module itself, or a name in it.
                taken_from = name.rpartition(".")[0] or name
                graph[importer].add(name if name in modules else taken_from)
    return graph


def room_of(name: str) -> str:
    return name.partition(".")[0]


def floor_of(name: str) -> int | None:
    return next((number for number, floor in enumerate(FLOORS) if room_of(name) in floor), None)


def against_the_order(graph: Imports) -> list[str]:
    """Every import from another room on the same floor or a higher one, in words."""
    wrong = []
    for importer, imported in graph.items():
        for name in sorted(imported):
            here, there = floor_of(importer), floor_of(name)
            if room_of(importer) != room_of(name) and (
                here is None or there is None or there >= here
            ):
                wrong.append(f"{importer} imports {name}")
    return wrong


def circle_in(graph: Imports) -> list[str]:
    """The modules of a circle, the first again at the end; none: an empty list."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_every_file_is_in_a_room() -> None:
    assert [name for name in modules_below(ROOT) if floor_of(name) is None] == []


def test_imports_point_down() -> None:
    assert against_the_order(imports_below(ROOT)) == []


def test_there_is_no_circle() -> None:
    assert circle_in(imports_below(ROOT)) == []


def test_the_optimizers_need_torch_alone() -> None:
    graph = imports_below(ROOT)
    package = {"hizoo", "error_broadcast", "forward_only", "zeroth_order"}
    modules = [name for name in modules_below(ROOT) if room_of(name) in package]
    for name in modules:
        assert {room_of(other) for other in graph[name]} <= package, name
        others = {room_of(other) for other in imported_names(modules_below(ROOT)[name], name)}
        assert others - sys.stdlib_module_names <= {"torch"} | package, name


WRONG_IMPORTS = [
    ({"trainer.py": "import hizoo, tasks", "tasks.py": "import metrics"}, [], set()),
    ({"tasks.py": "from hizoo import HiZOO"}, ["tasks imports hizoo"], set()),
    ({"utils.py": "def f():\n    from run import main"}, ["utils imports run"], set()),
    ({"utils.py": "import benchmarks.step"}, ["utils imports benchmarks"], set()),
    (
        {
            "tasks.py": "import typing\nif typing.TYPE_CHECKING:\n    import metrics",
            "metrics.py": "import templates",
            "templates.py": "from tasks import Task",
        },
        *(
            ["metrics imports templates", "templates imports tasks"],
            {"tasks", "metrics", "templates"},
        ),
    ),
    (
        {
            "language_model/__init__.py": "from .scoring import predict",
            "language_model/scoring.py": "from . import packing",
            "language_model/packing.py": "from language_model import scoring",
        },
        *([], {"language_model.scoring", "language_model.packing"}),
    ),
    (
        {
            "language_model/__init__.py": "",
            "language_model/deep/loading.py": "from ..scoring import predict",
            "language_model/scoring.py": "from language_model.deep.loading import load",
            "utils.py": "import language_model.scoring as scoring",
        },
        ["utils imports language_model.scoring"],
        {"language_model.scoring", "language_model.deep.loading"},
    ),
]


def test_wrong_imports_are_found(tmp_path: Path) -> None:
    failures = []
    for number, (files, order, circle) in enumerate(WRONG_IMPORTS):
        root = tmp_path / str(number)
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        graph = imports_below(root)
        found = against_the_order(graph), set(circle_in(graph))
        if found != (order, circle):
            failures.append((files, found))
    assert not failures


def test_a_file_in_no_room_is_found(tmp_path: Path) -> None:
    for name in ("stray.py", "folder/stray.py", "benchmarks/step.py", ".venv/lib/module.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert set(modules_below(tmp_path)) == {"stray", "folder.stray"}
    assert floor_of("stray") is floor_of("folder.stray") is None
