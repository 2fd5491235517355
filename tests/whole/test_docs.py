"""README and docs are true: commands parse, what is named exists, tables hold the committed numbers."""
import ast
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

import evaluate
import retrieve
import train
from ucdr_ref import config
from ucdr_ref.bench import animals, drawn, real
from ucdr_ref.config import FIELDS, VARIANTS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ucdr_ref"
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "weights" / "README.md"]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
README, RESULTS, LEDGER = (PAGES[name] for name in ("README.md", "docs/results.md", "docs/ledger.md"))
TEXT = "\n".join(PAGES.values()).replace("\\\n", " ")  # commands that go on in the next line stand in one
SCRIPTS = {"train": train, "evaluate": evaluate, "retrieve": retrieve}
COMMANDS = sorted(set(re.findall(r"(?:python|--) (train|evaluate|retrieve)\.py([^`\n&]*)", TEXT)))
MODULES = sorted(set(re.findall(r"python -m ((?:ucdr_ref|tests)\.[\w.]+)([^`\n&;)]*)", TEXT)))
ROW = r"^\| ([DS]\d+) \| (?:`--([a-z-]+)`|[^|]*) \| ([\w/]+\.py) \|.*\| ([GTR, ]+) \| ([^|]+) \|$"
ROWS = re.findall(ROW, LEDGER, re.MULTILINE)  # tag, flag, file, checked, effect


def numbers(name: str) -> dict:
    return json.loads((ROOT / "docs" / name).read_text())


def needed(part: Path) -> set[Path]:
    """`part` of the package, what it imports, what that imports and so on: files and subpackages."""
    found, ahead = set(), [part]
    while ahead:
        here = ahead.pop()
        found.add(here)
        for path in here.glob("*.py") if here.is_dir() else [here]:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.level == 2:
                    first = (node.module or node.names[0].name).split(".")[0]
                    target = PACKAGE / first if (PACKAGE / first).is_dir() else PACKAGE / f"{first}.py"
                    ahead += [target] if target not in found else []
    return found


def test_pages_are_short_and_finished():
    assert len(README.splitlines()) <= 130 and len(README.encode()) <= 9_000
    assert sum(len(page.encode()) for name, page in PAGES.items() if name.startswith("docs/")) <= 48_000
    assert not re.search(r"@@|<<|TODO|/work/|/tmp/", TEXT)


@pytest.mark.parametrize("script,arguments", COMMANDS)
def test_commands_parse(script, arguments, monkeypatch):
    parsed, parse = [], config.parse

    def stop_here(*arguments):
        parsed.append(parse(*arguments))
        raise InterruptedError

    monkeypatch.setattr(config, "parse", stop_here)
    with pytest.raises(InterruptedError):
        SCRIPTS[script].run(shlex.split(arguments, comments=True))
    assert getattr(parsed[0], "preset", None) in (None, *config.PRESETS)


@pytest.mark.parametrize("module,arguments", MODULES)
def test_module_commands_have_the_flags_that_are_given(module, arguments, monkeypatch, capsys):
    name = f"{module}.__main__" if (ROOT / module.replace(".", "/")).is_dir() else module
    monkeypatch.setattr(sys, "argv", [module, "--help"])  # tests.killtest takes no other
    main = importlib.import_module(name).main
    with pytest.raises(SystemExit) as ended:
        main(["--help"]) if module.startswith("ucdr_ref") else main()  # without arguments it would end with signals ignored
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    for flag in re.findall(r"--([\w-]+)", arguments):
        assert re.search(rf"--{flag}\b", shown), flag


def test_first_commands_are_what_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    assert "pip install -r requirements.txt && python train.py\n" in README
    assert "pip install -r requirements-dev.txt && python -m pytest -q -n 2\n" in README
    for line in ("-r requirements-dev.txt\n", "python -m pytest -q -n 2\n", "python train.py --fast"):
        assert line in ci
    required = dict(re.findall(r"^(\w+)>=([\d.]+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    torch, torchvision, pillow = (required[name] for name in ("torch", "torchvision", "pillow"))
    assert f"PyTorch {torch}, torchvision {torchvision} and Pillow {pillow}," in README


def test_links_files_and_flags_exist():
    for name, page in PAGES.items():
        for target in re.findall(r"\]\(((?!http)[^)]+)\)", page):
            path = target.partition("#")[0]
            assert not path or ((ROOT / name).parent / path).exists(), f"{name}: {target}"
    for path in re.findall(r"`((?:ucdr_ref|tests)/[\w./-]*\w)/?`", TEXT):
        assert (ROOT / path).exists(), path
    flags = {name.replace("_", "-") for name in FIELDS}
    for path in [*ROOT.glob("*.py"), *PACKAGE.glob("*/*.py"), ROOT / "tests" / "killtest.py"]:
        flags |= set(re.findall(r'add_argument\("--([\w-]+)"', path.read_text(encoding="utf-8")))
    elsewhere = {"help", "nnodes", "shm-size", "standalone", "data", "weights", "out"}  # argparse, torchrun, docker; in a loop
    assert set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)(?![\w_])", TEXT)) <= flags | elsewhere


def test_ledger_has_every_tag_at_its_line():
    assert re.findall(r"^\| ([DS]\d+) \|", LEDGER, re.MULTILINE) == [f"D{i}" for i in range(1, 20)] + [f"S{i}" for i in range(1, 9)]
    for tag, flag, file, *_ in ROWS:
        assert not flag or flag.replace("-", "_") in FIELDS, flag
        code = (PACKAGE / file).read_text(encoding="utf-8")
        assert re.search(rf"#.*\b{tag}\b|\(.*{tag}\b|\"{tag}\b", code), f"{tag} is not tagged in {file}"
    released = {tag for tag, flag, *_ in ROWS if flag.replace("-", "_") in VARIANTS["released"]}
    assert released >= {f"D{i}" for i in (*range(1, 10), 12, 14, 15)} | {f"S{i}" for i in (1, 2, 3, 6, 7, 8)}


def test_tables_are_those_of_the_committed_numbers():
    found = numbers("drawn.json")
    for part in ("main", "baselines", "ablation", "sre", "centring"):
        assert drawn.table(found[part]["runs"], list(drawn.PARTS[part]), drawn.COLUMNS[part]) in RESULTS, part
    effects = {row[0]: row[-1] for row in ROWS}
    for part, column in (("ledger", 2), ("protocol", 2), ("sre-ledger", 5), ("sre-protocol", 5)):
        for line in drawn.table(found[part]["runs"], list(drawn.PARTS[part]), drawn.COLUMNS[part]).splitlines()[3:]:
            tag, *cells = line.strip("| ").split(" | ")
            if tag != "all":
                assert effects[tag] == (cells[column - 1] if tag != "D7" else f"{cells[5]} U^dCDR"), tag
    measured = numbers("real-intel-2cores.json")
    rows = [row for row in [*measured["frozen"], *measured["trained"]] if "removed" not in row["method"]
            and (row.get("variant", "paper") == "paper" or not row["transductive"])]
    for gallery in ("unseen", "mixed"):
        assert real.table(rows, gallery) in RESULTS, gallery
    for line in README.splitlines():
        if line.startswith(("| zero-shot", "| UCDR-Adapter")) and " / " in line:
            pairs = re.findall(r"[\d.]+(?: ± [\d.]+)? / ", line)
            assert len(pairs) == 5 and all(pair.split(" ")[0] in RESULTS for pair in pairs), line
    assert animals.table(numbers("animals-intel-2cores.json")["runs"]) in RESULTS


def test_parts_to_copy_are_what_the_code_imports():
    rows = dict(re.findall(r"^\| ([^|]+) \| ((?:`[\w/.]+`(?:, )?)+) \|$", README, re.MULTILINE))
    parts = {"CLIP": "clip", "metrics and search": "metrics.py", "UCDR-Adapter": "ucdr", "SRE-CLIP": "sre"}
    for title, part in parts.items():
        names = sorted(path.name + "/" * path.is_dir() for path in needed(PACKAGE / part))
        assert rows[title] == ", ".join(f"`{name}`" for name in names), title
