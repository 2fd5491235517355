"""Who may import whom: the wings stand alone or on named others, imports are relative, there is no circle."""
from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ucdr_ref"
PATHS = sorted(PACKAGE.rglob("*.py"))
OUTSIDE = {"torch", "torchvision", "PIL", "numpy"} | set(sys.stdlib_module_names)
PEERS = {"open_clip", "faiss", "tests"}  # measured beside, by bench alone and only inside functions
# What a part may import of the package besides itself; bench is imported by nobody, demo by experiments, lazily.
MAY = {"clip": set(), "metrics": set(), "cli": set(), "ucdr": {"clip"}, "sre": {"clip"}, "config": {"ucdr", "sre"},
       "distributed": {"cli"}, "data": {"clip", "cli", "config", "distributed"}, "training": {"cli", "config", "distributed"},
       "experiments": {"clip", "metrics", "ucdr", "sre", "cli", "config", "distributed", "data", "training", "demo"},
       "demo": {"clip", "cli", "config", "data", "distributed"}}
MAY["bench"] = {*MAY} - {"bench"}


def module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def imports(path: Path) -> list[tuple[str, ast.stmt, bool]]:
    """(module inside the package, statement, whether it runs when the module is imported) of each import of the package."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    here = list(path.relative_to(PACKAGE).parent.parts)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                whole = PACKAGE.joinpath(*base, alias.name)
                is_module = whole.with_suffix(".py").exists() or whole.is_dir()
                found.append((".".join([*base, alias.name] if is_module else base), node, id(node) not in lazy))
    return found


@pytest.mark.parametrize("path", PATHS, ids=module)
def test_a_wing_imports_what_it_may(path):
    wing = module(path).split(".")[0]
    for name, statement, _ in imports(path):
        other = name.split(".")[0]
        allowed = {wing, *MAY.get(wing, ())}
        assert not other or other in allowed, f"{module(path)}: {ast.unparse(statement)}"


@pytest.mark.parametrize("path", PATHS, ids=module)
def test_imports_are_relative_or_of_the_three_packages(path):
    wing = module(path).split(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [str(node.module)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module", "exec", "eval"):
            raise AssertionError(ast.unparse(node))
        for name in names:
            assert name.split(".")[0] in (OUTSIDE | PEERS if wing == "bench" else OUTSIDE), ast.unparse(node)


def test_demo_is_imported_lazily_and_in_one_wing():
    for path in PATHS:
        wing = module(path).split(".")[0]
        for name, statement, at_import in imports(path):
            if name.split(".")[0] == "demo" and wing not in ("demo", "bench"):
                assert wing == "experiments" and not at_import, f"{module(path)}: {ast.unparse(statement)}"


def test_there_is_no_circle():
    edges = {module(path): {name for name, _, _ in imports(path)} for path in PATHS}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for other in edges.get(name, set()) - {name}:
                visit(other, (*above, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_every_wing_has_a_door_that_says_what_it_is():
    for folder in sorted({path.parent for path in PATHS} - {PACKAGE}):
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        assert len(text) > 80 and ("Read" in text or "python -m" in text), folder.name
    legend = ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))) or ""
    assert all(re.search(rf"^ +(\w+, )*{wing}\b", legend, re.MULTILINE) for wing in MAY), "the map of the parts"


def test_files_are_short():
    product = [path for path in PATHS if path.parent.name != "demo"]
    lines = {path: path.read_text(encoding="utf-8").splitlines() for path in [*PATHS, *ROOT.glob("*.py")]}
    assert not [str(path) for path in product if len(lines[path]) > (300 if path.parent.name != "bench" else 360)]
    for name, most in (("train.py", 60), ("evaluate.py", 60), ("retrieve.py", 90)):
        assert len(lines[ROOT / name]) <= most, name
