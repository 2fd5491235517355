"""Run folders written by version 0.1.0 before the package was divided into wings: they are evaluated and resumed as they were."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import evaluate
import train
from tests.helpers import write_world
from ucdr_ref.machine.files import load_state

LEGACY = Path(__file__).resolve().parents[1] / "legacy"
WEIGHTS = Path(__file__).resolve().parents[2] / "weights" / "demo-clip.pt"
COMMAND = ["--dataset", "folder", "--data-root", "data", "--class-split", "split.json", "--weights", "weights/demo-clip.pt",
           "--run", "stopped", "--source-batch", "6", "--target-batch", "8", "--target-epochs", "2", "--context-vectors", "4",
           "--queue-size", "4", "--workers", "0", "--target-lr", "1e-2", "--source-lr", "1e-3", "--save-every", "1"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the old runs' relative paths mean: their data, drawn again, and the shipped weights."""
    write_world(tmp_path)
    (tmp_path / "weights").mkdir()
    shutil.copy(WEIGHTS, tmp_path / "weights")
    for name in ("stopped", "sre"):
        shutil.copytree(LEGACY / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def same_numbers(found: Path, expected: str) -> None:
    """The rows that were there then have the numbers of then, but for another machine's rounding."""
    ours, theirs = (json.loads(path.read_text())["rows"] for path in (found / "results.json", LEGACY / expected))
    key = ("protocol", "gallery_name", "method") if "protocol" in theirs[0] else ("method",)
    of = {tuple(row[part] for part in key): row for row in ours}
    for row in theirs:
        for name in ("mAP@200", "mAP@all", "Prec@100") if "protocol" in row else ("instance", "class"):
            assert of[tuple(row[part] for part in key)][name] == pytest.approx(row[name], abs=0.03), (row, name)


def test_a_stopped_run_is_evaluated_then_resumed_to_its_end(place):
    assert evaluate.main(["--run", "stopped", "--out", "out", "--workers", "0"]) == 0
    same_numbers(place / "out", "stopped-results.json")
    assert train.main(COMMAND) == 0
    same_numbers(place / "stopped", "finished-results.json")
    log = (place / "stopped" / "log.jsonl").read_text()
    assert log.startswith((LEGACY / "stopped" / "log.jsonl").read_text()) and log.count('"validation_mAP"') == 2


def test_a_run_from_before_a_field_takes_its_default(place):
    """Pictures and report ask for fields that old checkpoints lack."""
    path = place / "stopped" / "best.pt"
    state = load_state(path)
    for name in ("stroke_domains", "image_reading"):
        state["config"].pop(name, None)
    torch.save(state, path)
    assert evaluate.main(["--run", "stopped", "--out", "out", "--workers", "0"]) == 0
    config = json.loads((place / "out" / "results.json").read_text())["config"]
    assert config["stroke_domains"] == ["sketch", "quickdraw", "sketches"] and config["context_vectors"] == 4


def test_a_finished_sre_run_is_evaluated(place):
    from ucdr_ref.demo.drawing import CLASSES, write_dataset
    write_dataset(place / "toy" / "target", CLASSES, ["sketch"], 1)
    assert evaluate.main(["--run", "sre", "--workers", "0"]) == 0
    same_numbers(place / "sre", "sre-results.json")
