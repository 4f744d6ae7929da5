"""Imports go one way: between the packages, between their sub-packages, and without a circle of modules."""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: packages from the lowest to the highest layer; a package imports from lower layers only
LAYERS = ("datamodules", "lightning_modules", "callbacks", "commands", "main")
ALLOWED = {name: {*LAYERS[:index], name} for index, name in enumerate(LAYERS)} | {"optimizers": {"optimizers"}}
ALLOWED["commands"] |= {"optimizers"}
ALLOWED["main"] = {"commands"}
#: optional and slow packages, which are imported where they are used
HEAVY = {"bitsandbytes", "torch_xla", "xgrammar", "llguidance", "gguf", "datasets", "trl"}


def files(package):
    return [ROOT / "main.py"] if package == "main" else sorted((ROOT / package).rglob("*.py"))


PAIRS = [pytest.param(p, file, id=str(file.relative_to(ROOT))) for p in ALLOWED for file in files(p)]


def name_of(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def graph():
    """Imports of every module of ours, under TYPE_CHECKING and inside functions too."""
    modules = {name_of(file): file for package in ALLOWED for file in files(package)}
    found = {}
    for name, file in modules.items():
        edges = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                edges |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{name}: relative import"
                edges |= {f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in modules else node.module
                          for a in node.names}  # fmt: skip
        found[name] = edges & modules.keys() - {name}
    return found


def package_of(module):
    """Its sub-package, with an empty package's own modules each by itself."""
    parts = module.split(".")
    folder = ROOT.joinpath(*parts)
    return module if folder.is_dir() or len(parts) < 3 else ".".join(parts[:-1])


@pytest.mark.parametrize(("package", "file"), PAIRS)
def test_packages_import_lower_layers_only(package, file):
    used = {module.split(".")[0] for module in graph()[name_of(file)]}
    assert used <= ALLOWED[package]


def test_no_circle_of_modules():
    # a package's __init__ re-exports; who imports a module runs it, but depends on none of its names
    edges = {name: {m for m in used if not (ROOT.joinpath(*m.split(".")) / "__init__.py").is_file()}
             for name, used in graph().items()}  # fmt: skip
    assert list(TopologicalSorter(edges).static_order())


def test_no_circle_of_sub_packages():
    edges = {}
    for name, used in graph().items():
        own = package_of(name)
        edges.setdefault(own, set()).update(package_of(module) for module in used)
        edges[own].discard(own)
    for top in ALLOWED:  # the __init__ of a package imports what it re-exports
        edges.pop(top, None)
    assert list(
        TopologicalSorter({a: {b for b in used if b not in ALLOWED} for a, used in edges.items()}).static_order()
    )


@pytest.mark.parametrize(("package", "file"), PAIRS)
def test_heavy_packages_are_imported_where_they_are_used(package, file):
    tops = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            tops |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            tops.add(str(node.module).split(".")[0])
    assert not tops & HEAVY


def test_every_package_was_walked():
    assert all(files(package) for package in ALLOWED)
    assert len(graph()) > 100
