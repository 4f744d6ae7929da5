"""Imports go one way: main -> commands -> callbacks -> lightning_modules -> datamodules; optimizers stand alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "main": {"commands", "callbacks", "lightning_modules", "optimizers", "datamodules"},
    "commands": {"commands", "callbacks", "lightning_modules", "optimizers", "datamodules"},
    "callbacks": {"callbacks", "lightning_modules", "datamodules"},
    "lightning_modules": {"lightning_modules", "datamodules"},
    "optimizers": {"optimizers"},
    "datamodules": {"datamodules"},
}
HEAVY = {"bitsandbytes", "torch_xla", "xgrammar", "llguidance", "gguf", "datasets", "trl"}


def modules():
    for room in ALLOWED:
        yield from (
            (room, file) for file in ([ROOT / "main.py"] if room == "main" else sorted((ROOT / room).rglob("*.py")))
        )


def imported(node):
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    return {node.module.split(".")[0]} if isinstance(node, ast.ImportFrom) and node.module and not node.level else set()


@pytest.mark.parametrize(("room", "file"), [pytest.param(*m, id=str(m[1].relative_to(ROOT))) for m in modules()])
def test_imports_go_one_way(room, file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = set().union(*(imported(node) for node in ast.walk(tree)))
    assert not (names & ALLOWED.keys()) - ALLOWED[room]


@pytest.mark.parametrize(("room", "file"), [pytest.param(*m, id=str(m[1].relative_to(ROOT))) for m in modules()])
def test_heavy_packages_are_imported_where_they_are_used(room, file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert not set().union(*(imported(node) for node in tree.body), set()) & HEAVY


def test_every_room_was_walked():
    assert {room for room, _ in modules()} == ALLOWED.keys()
