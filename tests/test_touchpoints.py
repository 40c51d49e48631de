"""The table in `model_executors/README.md` names all that we lean on in vLLM, and the installed vLLM has all of it.

After an upgrade this is the first test to run: `python -m tests.test_touchpoints` prints the rows as they should be.
"""

import ast
import re
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "model_executors" / "README.md"
PACKAGES = ("model_executors", "vllm_ext", "serving")
ROW = re.compile(r"^\| `([\w/]+\.py)` \| (.+) \|$", re.MULTILINE)


def table() -> dict[str, list[str]]:
    """What each file leans on, as the README says."""
    section = README.read_text().partition("## Touchpoints")[2]
    return {file: re.findall(r"`([^`]+)`", names) for file, names in ROW.findall(section)}


def imported(file: Path) -> list[str]:
    """What a file imports from vLLM, as `module:name`."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            found += [f"{node.module}:{each.name}" for each in node.names]
        if isinstance(node, ast.Import):
            found += [each.name for each in node.names if each.name.split(".")[0] == "vllm"]
    return sorted(set(found))


def files() -> dict[str, list[str]]:
    """Of every file of ours that imports something from vLLM, what it is."""
    found = {
        str(file.relative_to(ROOT)): imported(file)
        for package in PACKAGES
        for file in sorted((ROOT / package).rglob("*.py"))
    }
    return {file: names for file, names in found.items() if names}


def rows() -> str:
    """The table as it should be: what is imported, and what else a row names already."""
    kept = table()
    lines = []
    for file, names in files().items():
        more = [name for name in kept.get(file, []) if name not in names and resolves(name)]
        lines.append(f"| `{file}` | {', '.join(f'`{name}`' for name in [*names, *more])} |")
    return "\n".join(lines)


def resolves(name: str) -> bool:
    """Whether the installed vLLM has `module:name.name`."""
    module, _, attributes = name.partition(":")
    try:
        found = import_module(module)
    except ImportError:
        return False
    for attribute in filter(None, attributes.split(".")):
        if is_dataclass(found) and attribute in found.__dataclass_fields__:
            return True
        if not hasattr(found, attribute):
            try:
                found = import_module(f"{module}.{attribute}")
            except ImportError:
                return False
        else:
            found = getattr(found, attribute)
    return True


def test_the_installed_vllm_has_all_of_it():
    missing = [f"{file}: {name}" for file, names in table().items() for name in names if not resolves(name)]
    assert not missing


@pytest.mark.parametrize("file", files())
def test_the_table_has_all_that_is_imported(file):
    missing = set(files()[file]) - set(table().get(file, []))
    assert not missing, "python -m tests.test_touchpoints prints the rows as they should be"


def test_the_table_has_no_rows_too_many():
    assert not table().keys() - files().keys()
    for file, names in table().items():
        text = (ROOT / file).read_text()
        unused = [name for name in names if name.split(":")[-1].split(".")[-1] not in text]
        assert not unused, file


if __name__ == "__main__":
    print(rows())
