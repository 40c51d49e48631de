"""Which of our modules import which: no circle, and one direction only. Imports inside functions count."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What the modules of a package may import, beside the package itself. A longer name goes before its beginning.
ALLOWED = {
    "vllm_ext.cli": {"vllm_ext", "serving", "model_executors", "loadtests"},
    "vllm_ext": {"model_executors"},
    "serving": {"vllm_ext", "model_executors"},
    "model_executors": set(),
    "loadtests": set(),
}


def modules() -> dict[str, Path]:
    """Every module by its name; a package stands for its `__init__`."""
    files = [file for package in ALLOWED if "." not in package for file in (ROOT / package).rglob("*.py")]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imported(tree: ast.AST, known: dict[str, Path]) -> set[str]:
    """Those of `known` that a module imports: not what it only names in types, nor what it imports as a program."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
            node.body = []
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            wholes = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {whole if whole in known else node.module for whole in wholes}
    return names & set(known)


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imported(ast.parse(file.read_text()), known) for name, file in known.items()}


def package(module: str) -> str:
    return next(name for name in ALLOWED if module == name or module.startswith(f"{name}."))


def test_reads_imports_wherever_they_are():
    code = """
from typing import TYPE_CHECKING
import a.b
from a import c, other
if TYPE_CHECKING:
    from a import typed
def late():
    from a.late import name
if __name__ == "__main__":
    from a import main
"""
    known = dict.fromkeys(["a", "a.b", "a.c", "a.typed", "a.late", "a.main", "a.unused"], ROOT)
    assert imported(ast.parse(code), known) == {"a", "a.b", "a.c", "a.late"}


def test_no_module_imports_itself_by_way_of_others(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_packages_import_in_one_direction(graph):
    against = [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if package(other) not in {package(module), *ALLOWED[package(module)]}
    ]
    assert against == []
    assert {package(module) for module in graph} == set(ALLOWED)
