"""README and docs are true: commands parse, what is named exists, tables hold the committed numbers."""
from __future__ import annotations

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
from ucdr_ref.bench import animals, drawn, real
from ucdr_ref.config import FIELDS, PRESETS, VARIANTS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ucdr_ref"
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "weights" / "README.md"]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
README, RESULTS, LEDGER = (PAGES[name] for name in ("README.md", "docs/results.md", "docs/ledger.md"))
TEXT = "\n".join(PAGES.values()).replace("\\\n", " ")  # commands that go on in the next line stand in one
SCRIPTS = {"train": train, "evaluate": evaluate, "retrieve": retrieve}
COMMANDS = sorted(set(re.findall(r"(?:python|--) (train|evaluate|retrieve)\.py([^`\n&]*)", TEXT)))
MODULES = sorted(set(re.findall(r"python -m ((?:ucdr_ref|tests)\.[\w.]+)([^`\n&]*)", TEXT)))
ROW = r"^\| ([DS]\d+) \| `--([a-z-]+)` \| ([\w/]+\.py) \|.*\| ([GTR, ]+) \| ([^|]+) \|$"
ROWS = re.findall(ROW, LEDGER, re.MULTILINE)  # tag, flag, file, checked, effect


def numbers(name: str) -> dict:
    return json.loads((ROOT / "docs" / name).read_text())


def anchors(page: str) -> set[str]:
    """The names by which a page's headings are linked to."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def needed(part: Path) -> set[Path]:
    """`part` of the package, what it imports, what that imports and so on: files and wings."""
    found, open_parts = set(), [part]
    while open_parts:
        here = open_parts.pop()
        found.add(here)
        for path in here.glob("*.py") if here.is_dir() else [here]:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.level > 0:
                    folder = path.parent if node.level == 1 else path.parent.parent
                    first = (node.module or node.names[0].name).split(".")[0]
                    target = folder / first if (folder / first).is_dir() else folder / f"{first}.py"
                    target = here if folder == here and here.is_dir() else target
                    if target.exists() and target not in found:
                        open_parts.append(target)
    return found


def test_readme_is_short():
    assert len(README.splitlines()) <= 150 and len(README.encode()) <= 12_000
    assert max(map(len, README.splitlines())) <= 120


def test_pages_name_nothing_unfinished():
    assert not re.search(r"@@|TODO|/work/|/tmp/", TEXT)


@pytest.mark.parametrize("script,arguments", COMMANDS)
def test_commands_parse(script, arguments):
    args = SCRIPTS[script].parse(shlex.split(arguments, comments=True))
    if getattr(args, "preset", None):
        assert args.preset in PRESETS


@pytest.mark.parametrize("module,arguments", MODULES)
def test_module_commands_have_the_flags_that_are_given(module, arguments, monkeypatch, capsys):
    name = f"{module}.__main__" if (ROOT / module.replace(".", "/")).is_dir() else module
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for flag, value in re.findall(r"--([\w-]+)(?: ([\w/.-]+))?", arguments):
        assert re.search(rf"--{flag}\b", shown), flag
        choices = re.search(rf"--{flag} \{{([^}}]+)\}}", shown)
        assert not choices or value in choices[1].replace("\n", "").replace(" ", "").split(","), (flag, value)


def test_first_commands_are_what_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    assert "pip install -r requirements.txt && python train.py\n" in README
    assert "pip install -r requirements-dev.txt && python -m pytest -q -n 2\n" in README
    for line in ("-r requirements-dev.txt\n", "python -m pytest -q -n 2\n", "python train.py --fast"):
        assert line in ci
    assert (ROOT / "requirements-dev.txt").read_text().startswith("-r requirements.txt\n")


def test_requirements_and_python_are_those_of_the_project():
    required = dict(re.findall(r"^(\w+)>=([\d.]+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    torch, torchvision, pillow = (required[name] for name in ("torch", "torchvision", "pillow"))
    python = re.findall(r'target-version = "py3(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert f"Python 3.{python[0]}, PyTorch {torch}, torchvision {torchvision} and Pillow {pillow}," in README


def test_links_resolve():
    for name, page in PAGES.items():
        for target in re.findall(r"\]\(((?!http)[^)]+)\)", page):
            path, _, anchor = target.partition("#")
            there = (ROOT / name).parent / path if path else ROOT / name
            assert there.exists(), f"{name}: {target}"
            assert not anchor or anchor in anchors(there.read_text(encoding="utf-8")), f"{name}: {target}"
    for page in ("docs/data.md", "docs/ledger.md", "docs/results.md", "docs/running.md", "weights/README.md"):
        assert f"]({page})" in README


def test_files_and_flags_that_are_named_exist():
    for path in re.findall(r"`((?:ucdr_ref|tests)/[\w./-]*\w)/?`", TEXT):
        assert (ROOT / path).exists(), path
    flags = {name.replace("_", "-") for name in FIELDS}
    for path in [*ROOT.glob("*.py"), *PACKAGE.glob("*/*.py"), ROOT / "tests" / "killtest.py"]:
        flags |= set(re.findall(r'add_argument\("--([\w-]+)"', path.read_text(encoding="utf-8")))
    elsewhere = {"help", "help-all", "index-url", "nnodes", "shm-size", "standalone", "steps", "data"}  # argparse, pip, torchrun, docker; bench, in a loop
    assert set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)(?![\w_])", TEXT)) <= flags | elsewhere


def test_ledger_has_every_tag_at_its_line():
    assert [row[0] for row in ROWS] == [f"D{i}" for i in range(1, 19)] + [f"S{i}" for i in range(1, 9)]
    assert re.search(r"^\| D19 \| none \| - \|.*not emulated", LEDGER, re.MULTILINE)
    for tag, flag, file, *_ in ROWS:
        assert flag.replace("-", "_") in FIELDS, flag
        code = (PACKAGE / file).read_text(encoding="utf-8")
        assert re.search(rf"#.*\b{tag}\b|\({tag}\b", code), f"{tag} is not tagged in {file}"
    released = {tag for tag, flag, *_ in ROWS if flag.replace("-", "_") in VARIANTS["released"]}
    assert released >= {f"D{i}" for i in (*range(1, 10), 12, 14, 15)} | {f"S{i}" for i in (1, 2, 3, 6, 7, 8)}
    assert f"of the {len(ROWS) + 1} entries" in README  # D19 has no flag
    named = re.findall(r"^\| ([DS]\d+) \|", README, re.MULTILINE) + re.findall(r"\b([DS]\d+)\b(?=[,)])", TEXT)
    assert set(named) <= {row[0] for row in ROWS}


def test_tables_of_the_drawn_benchmark_are_those_of_the_committed_numbers():
    found = numbers("drawn.json")
    assert set(found) == set(drawn.PARTS)
    for part in ("main", "baselines", "ablation", "sre", "sre-baselines"):  # "unequal" is of a wrong D15
        table = drawn.table(found[part]["runs"], list(drawn.PARTS[part]), drawn.COLUMNS[part])
        assert table + "\n" in RESULTS
    effects = {row[0]: row[-1] for row in ROWS}
    assert effects.pop("D15") == "not measured"
    for part, column in (("ledger", 2), ("protocol", 2), ("sre-ledger", 5), ("sre-protocol", 5)):
        lines = drawn.table(found[part]["runs"], list(drawn.PARTS[part]), drawn.COLUMNS[part]).splitlines()
        for line in lines[3:]:
            tag, *cells = line.strip("| ").split(" | ")
            if part == "protocol" and tag in ("D15", "all"):
                continue  # measured with a wrong D15
            if tag == "all":
                assert re.search(rf"\b(by|H by) {re.escape(cells[column - 1])}", " ".join(LEDGER.split()))
            else:
                assert effects.pop(tag) == (cells[column - 1] if tag != "D7" else f"{cells[5]} U^dCDR")
    raw, normal = ([run["numbers"]["UCDR unseen zero-shot"] for run in found["baselines"]["runs"] if run["name"] == name]
                   for name in ("query sketch, raw features (D18)", "query sketch"))
    assert effects == {"D11": "none", "D18": f"{raw[0] - normal[0]:.1f} zero-shot"}
    for name, part in found.items():
        assert part["date"] in (LEDGER if re.search("ledger|protocol|unequal", name) else RESULTS)


def test_tables_of_real_images_are_those_of_the_committed_numbers():
    found = numbers("real-intel-2cores.json")
    rows = [*found["frozen"], *found["trained"]]
    for gallery in real.GALLERIES:
        assert real.table(rows, gallery) + "\n" in RESULTS
    shown = [row for row in rows if row.get("inversion") != "none" and row.get("variant", "paper") == "paper"
             and not row["method"].endswith("removed")]
    assert real.table(shown, "unseen") + "\n" in README
    assert {"command", "machine", "versions", "date"} <= found.keys() and found["command"] in RESULTS
    assert found["date"] in RESULTS and found["machine"] == "intel-2cores"
    assert animals.table(numbers("animals-intel-2cores.json")["runs"]) + "\n" in RESULTS


@pytest.mark.parametrize("name", ["speed-b32.json", "speed-b16.json"])
def test_tables_of_speed_are_those_of_the_committed_numbers(name):
    titles = {"phase1": "phase 1, a step", "phase2": "phase 2, a step", "encode": "encoding, 50 images",
              "read": "reading 64 photos", "metrics": "retrieval metrics"}
    parts = numbers(name)["parts"]
    for part, found in parts.items():
        if part not in titles or name == "speed-b16.json" and part == "metrics":
            continue  # below; the same computation whatever the tower
        seconds = [found[side]["cpu_s"] for side in ("ours", "plain")]
        memory = [f"{found[side]['memory_gib']:.1f}" for side in ("ours", "plain")]
        shown = [f"{value:.1f}" if value < 500 else f"{value:.0f}" for value in seconds]
        ratio = seconds[1] / seconds[0]
        row = [titles[part], *shown, f"{ratio:.1f}" if ratio < 50 else f"{ratio:.0f}", *memory]
        assert "| " + " | ".join(row) + " |\n" in RESULTS
    if "closed-form" in parts:
        assert f"costs {parts['closed-form']['ours']['passes']:.4f} passes" in RESULTS
        assert f"takes {parts['closed-form']['ours']['fit_s']:.2f} CPU-seconds" in RESULTS
        speeds = [parts["read"][side]["images_per_s"] for side in ("ours", "plain")]
        assert f"reads {speeds[0]:.0f} images a second here and {speeds[1]:.0f} plain" in RESULTS
        for case in parts["search"]["cases"]:
            ours, *peers, once = (1000 * case[f"{side}_wall_s"] for side in ("ours", "faiss", "blas", "once"))
            row = (case["queries"], case["threads"], f"{ours:.0f}", *(f"{ms:.0f}" for ms in peers),
                   f"{ours / min(peers):.2f}", f"{once:.0f}")
            assert "| " + " | ".join(map(str, row)) + " |\n" in RESULTS


def test_ratios_without_avx512_are_those_of_the_committed_numbers():
    parts, words = numbers("speed-b32-avx2.json")["parts"], " ".join(RESULTS.split())
    phases = [parts[phase]["plain"]["cpu_s"] / parts[phase]["ours"]["cpu_s"] for phase in ("phase1", "phase2")]
    assert f"gives {phases[0]:.1f} and {phases[1]:.1f} (`docs/speed-b32-avx2.json`)" in words
    search = [case["ours_wall_s"] / case["faiss_wall_s"] for case in parts["search"]["cases"]]
    assert f"gave {', '.join(f'{ratio:.2f}' for ratio in search)} for here / FAISS (row by row) in the six lines" in words


@pytest.mark.parametrize("name", ["speed-b32.json", "speed-b16.json", "speed-b32-avx2.json"])
def test_a_document_says_whether_its_figures_are_met(name):
    document = numbers(name)
    assert document["all_met"] == all(check["met"] for part in document["parts"].values() for check in part["required"])


def test_versions_are_those_of_the_committed_numbers():
    documents = [numbers("real-intel-2cores.json"), numbers("speed-b32.json"), numbers("speed-b16.json"),
                 numbers("speed-b32-avx2.json"), *numbers("drawn.json").values()]
    for versions in (document["versions"] for document in documents):
        for title in ("Python", "PyTorch", "torchvision", "Pillow"):
            version = versions[{"PyTorch": "torch"}.get(title, title.lower())]
            assert f"{title} {version.split('+')[0]}" in " ".join(RESULTS.split())


def test_parts_to_copy_are_what_the_code_imports():
    rows = dict(re.findall(r"^\| ([^|]+) \| ((?:`[\w/.]+`(?:, )?)+) \|$", README, re.MULTILINE))
    parts = {"CLIP": "clip", "metrics and search": "metrics.py", "UCDR-Adapter": "ucdr", "SRE-CLIP": "sre"}
    for title, part in parts.items():
        names = sorted(path.name + "/" * path.is_dir() for path in needed(PACKAGE / part))
        assert rows[title] == ", ".join(f"`{name}`" for name in names), title


def test_calls_that_are_named_exist():
    calls = re.findall(r"[`(]((?:clip|ucdr|sre|experiments|metrics)(?:\.\w+)*?)\.(\w+)\(", README)
    assert len(calls) == 11
    for module, name in calls:
        assert callable(getattr(importlib.import_module(f"ucdr_ref.{module}"), name)), f"{module}.{name}"
