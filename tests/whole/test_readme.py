"""The README is true: its commands parse or are run, its flags, presets, files and ledger tags exist."""
from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

import evaluate
import retrieve
import train
from ucdr_ref.bench import drawn as benchmark
from ucdr_ref.config import FIELDS, PRESETS, VARIANTS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"python (train|evaluate|retrieve)\.py([^`\n&]*)", README)))
LEDGER = re.findall(r"^\| ([DS]\d+) \| `--([a-z-]+)` \| ([\w/]+\.py) \|", README, re.MULTILINE)


@pytest.mark.parametrize("script,arguments", COMMANDS)
def test_commands_parse(script, arguments):
    module = {"train": train, "evaluate": evaluate, "retrieve": retrieve}[script]
    args = module.parse(shlex.split(arguments))
    if getattr(args, "preset", None):
        assert args.preset in PRESETS


def test_first_commands_are_what_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    assert "pip install -r requirements.txt && python train.py\n" in README
    assert "pip install -r requirements-dev.txt && python -m pytest -q\n" in README
    assert "-r requirements-dev.txt" in ci and "python -m pytest -q\n" in ci and "python train.py --fast" in ci
    assert (ROOT / "requirements-dev.txt").read_text().startswith("-r requirements.txt\n")


def test_ledger_has_every_tag_at_its_line():
    assert [tag for tag, _, _ in LEDGER] == [f"D{i}" for i in range(1, 16)] + [f"S{i}" for i in range(1, 9)]
    for tag, flag, file in LEDGER:
        assert flag.replace("-", "_") in FIELDS, flag
        path = ROOT / "ucdr_ref" / file
        code = path.read_text(encoding="utf-8")
        assert re.search(rf"#.*\b{tag}\b|\({tag}\b", code), f"{tag} is not tagged in {file}"
    released = {tag for tag, flag, _ in LEDGER if flag.replace("-", "_") in VARIANTS["released"]}
    assert released >= {f"D{i}" for i in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 14, 15)} | {f"S{i}" for i in (1, 2, 3, 6, 7, 8)}


def test_tables_are_those_of_the_committed_numbers():
    found = json.loads((ROOT / "docs" / "drawn.json").read_text())
    assert set(found) == set(benchmark.PARTS)
    for part in ("main", "ablation", "sre"):
        for line in benchmark.table(found[part]["runs"], list(benchmark.PARTS[part]), benchmark.COLUMNS[part]).splitlines():
            assert line + "\n" in README
    effects = dict(re.findall(r"^\| ([DS]\d+) \|.*\| ([^|]+) \|$", README, re.MULTILINE))
    for part, column in (("ledger", 2), ("sre-ledger", 5)):
        names = list(benchmark.PARTS[part])
        for line in benchmark.table(found[part]["runs"], names, benchmark.COLUMNS[part]).splitlines()[3:]:
            tag, *cells = line.strip("| ").split(" | ")
            assert tag == "all" or effects.pop(tag) == (cells[column - 1] if tag != "D7" else f"{cells[5]} U^dCDR")
    assert effects == {"D11": "none"}


def test_files_and_flags_that_are_named_exist():
    for path in re.findall(r"\]\(((?!http|#)[^)]+)\)", README):
        assert (ROOT / path).exists(), path
    known = {name.replace("_", "-") for name in FIELDS}
    text = "".join((ROOT / f"{script}.py").read_text() for script in ("train", "evaluate", "retrieve"))
    known |= set(re.findall(r'"--([a-z-]+)"', text))
    known |= {"part", "seeds", "data", "steps", "arch", "nnodes", "json", "pretrain", "wordnet", "classes", "out"}
    assert set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)(?!\w)", README)) <= known
    assert "@@" not in README
