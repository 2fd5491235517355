"""Who may import whom, without a circle; sizes."""
import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ucdr_ref"
PATHS = sorted(PACKAGE.rglob("*.py"))
OUTSIDE = {"torch", "torchvision", "PIL", "numpy"} | set(sys.stdlib_module_names)
PEERS = {"open_clip", "faiss", "tests"}  # in bench alone: measured beside, the plain transcription among them
# What a part may import of the package besides itself; bench is imported by nobody, demo lazily.
MAY = {"clip": set(), "metrics": set(), "cli": set(), "ucdr": {"clip"}, "sre": {"clip"}, "config": {"ucdr", "sre"},
       "distributed": {"cli"}, "data": {"clip", "cli", "config", "distributed"}, "training": {"cli", "config", "distributed"},
       "experiments": {"clip", "metrics", "ucdr", "sre", "cli", "config", "distributed", "data", "training", "demo"},
       "demo": {"clip", "cli", "config", "data", "distributed"}}
MAY["bench"] = {*MAY} - {"bench"}


def module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def imports(path: Path) -> list[tuple[str, ast.stmt, bool]]:
    """(module inside the package, statement, whether it runs at import) of each import of the package."""
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
def test_imports_are_those_that_are_allowed(path):
    part = module(path).split(".")[0]
    for name, statement, at_import in imports(path):
        other = name.split(".")[0]
        assert not other or other == part or other in MAY[part], ast.unparse(statement)
        assert other != "demo" or part in ("demo", "bench") or not at_import, "demo is imported lazily"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [str(node.module)]
        for name in names:
            assert name.split(".")[0] in (OUTSIDE | PEERS if part == "bench" else OUTSIDE), ast.unparse(node)


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


def test_the_package_does_not_grow():
    core = [path for path in PATHS if path.relative_to(PACKAGE).parts[0] not in ("demo", "bench")]
    assert len(core) <= 35 and sum(path.stat().st_size for path in core) <= 220_600
    assert sum(path.stat().st_size for path in (PACKAGE / "bench").glob("*.py")) <= 60_000
    assert sum(path.stat().st_size for path in (ROOT / "tests").rglob("*.py")) <= 300_000
    for path in [*PATHS, *ROOT.glob("*.py")]:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 300 and (path.parent.name == "demo" or max(map(len, lines)) <= 110), path.name
