"""The tests mirror the source tree."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("datamodules", "lightning_modules", "optimizers", "callbacks", "commands")
LINES = 120  #: a module with more lines has a test file of its own
FILES = 14  #: largest number of modules in a folder
MODULES = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def relative(file):
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", [f for f in MODULES if len(f.read_text().splitlines()) > LINES], ids=relative)
def test_a_large_module_has_a_test_file(file):
    name = file.parent.name if file.stem == "__init__" else file.stem
    test = ROOT / "tests" / file.relative_to(ROOT).with_name(f"test_{name}.py")
    assert test.is_file(), f"{relative(file)} has more than {LINES} lines. Fix: add {relative(test)}"


@pytest.mark.parametrize("folder", sorted({file.parent for file in MODULES}), ids=relative)
def test_a_folder_stays_small(folder):
    assert len(list(folder.glob("*.py"))) <= FILES


@pytest.mark.parametrize("file", TESTS, ids=relative)
def test_no_test_module_imports_another(file):
    """Shared builders are in ``tests/helpers``."""
    modules = {node.module or "" for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)}
    shared = {name for name in modules if name.split(".")[0] in ("tests", "conftest") or name.startswith("test_")}
    assert all(name.startswith("tests.helpers.") for name in shared), shared


def test_the_tree_was_walked():
    assert len(MODULES) > 100
    assert len(TESTS) > 80
