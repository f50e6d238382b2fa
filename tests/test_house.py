"""The shape of the house: what may import what, how long a file may be, and that every key is read by something."""

import ast
import re
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from src.config import SECTIONS

PROJECT = Path(__file__).resolve().parent.parent
SRC = PROJECT / "src"
METHOD = (SRC / "train_grpo.py").read_text(encoding="utf-8")
KEYS = [(section, field.name) for section, kind in SECTIONS.items() for field in fields(kind)]


def name_of(path: Path) -> str:
    """src/engine/__init__.py -> src.engine"""
    return ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for path in sorted(SRC.rglob("*.py"))}


def nodes(tree: ast.AST):
    """All nodes but those of an `if TYPE_CHECKING:`, which is never run."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            yield from nodes(node)


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of src that a module imports, also inside a function; names from a package are its own."""
    found = set()
    for node in nodes(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write imports from src"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in whole}
    return frozenset(name for name in found if name.partition(".")[0] == "src")


def test_no_import_goes_round_in_a_circle():
    """A package's own front door stands for its files: from outside they are loaded together."""
    done: set[str] = set()

    def follow(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in sorted(imports(module) - {"src"}):
                follow(other, (*path, module))
            done.add(module)

    for module in FILES:
        follow(module, ())
    assert len(done) > 50


DOORS = {  # package -> what its files may import of src, beside each other
    "src.engine": {"src.records", "src.config"},
    "src.tasks": {"src.records", "src.config"},
    "src.run": {"src.records", "src.config", "src.engine"},
}


@pytest.mark.parametrize("package", DOORS)
def test_a_package_imports_what_its_door_allows(package):
    for module in FILES:
        if module == package or module.startswith(f"{package}."):
            others = {name for name in imports(module) if name != "src" and not f"{name}.".startswith(f"{package}.")}
            assert others <= DOORS[package], module


@pytest.mark.parametrize("package", DOORS)
def test_no_file_imports_through_the_door_of_its_own_package(package):
    """The door imports it: `import src.engine.layers as layers` or `from src.engine.layers import name`."""
    for module in FILES:
        if module.startswith(f"{package}."):
            statements = ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8")))
            assert package not in {node.module for node in statements if isinstance(node, ast.ImportFrom)}, module


def test_the_method_is_one_file_that_says_nothing_of_machines():
    lines = METHOD.splitlines()
    assert len(lines) <= 450
    assert len([line for line in lines if re.match(r"\s*(import|from) ", line)]) <= 12
    words = set(re.findall(r"[a-z]+", METHOD.lower()))
    assert words & {"distributed", "rank", "phase", "lock", "memory", "hub", "lora", "offline"} == set()


def test_files_beside_the_packages_use_their_front_doors():
    beside = [module for module, path in FILES.items() if path.parent == SRC and module != "src.commands"]
    assert {module: name for module in beside for name in imports(module) if name.count(".") > 1} == {}


def test_no_file_is_too_long():
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in FILES.items()}
    del lengths["src.config"], lengths["src.train_grpo"]
    assert {module: length for module, length in lengths.items() if length > 350} == {}


def test_there_are_at_most_112_keys_and_each_is_read_by_something():
    assert len(KEYS) <= 112
    read = {"prompt_column", "answer_column"}  # by getattr, for the columns that a task names
    for module in FILES.keys() - {"src.config"}:
        for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    assert [f"{section}.{name}" for section, name in KEYS if name not in read] == []
