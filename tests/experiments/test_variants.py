"""Through train.py and its loop: the released reading of images (D19) and training in bfloat16."""
from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import evaluate
import train
from tests.experiments.test_sre_cli import flags as sre_flags
from tests.experiments.test_sre_cli import scene  # noqa: F401, a fixture
from tests.helpers import flags, logged
from ucdr_ref.clip.zero_shot import ZeroShot
from ucdr_ref.images.features import Extractor
from ucdr_ref.machine.files import load_state
from ucdr_ref.sre.adapter import SRECLIP
from ucdr_ref.ucdr.adapter import UCDRAdapter

READINGS = {"as-is": [], "upright": ["--image-reading", "upright"]}  # what --variant released needs for each
TRAINED, QUERIED = "photo/shape_3/0.png", "sketch/shape_6/0.png"


def make_transparent(*paths: Path) -> None:
    """Nothing but transparency over red: white where it is composited, red as it is."""
    for path in paths:
        Image.new("RGBA", (40, 36), (255, 0, 0, 0)).save(path)


def noted(monkeypatch: pytest.MonkeyPatch, method: type) -> tuple[dict[str, Tensor], list]:
    """Frozen CLIP's features {domain/class/name: [e]} and the batches of training, filled while a run goes on."""
    features: dict[str, Tensor] = {}
    batches: list = []
    stream, step = Extractor.stream, method.step

    def streaming(self, files, *rest):
        for indices, rows, inverted in stream(self, files, *rest):
            if isinstance(self.method, ZeroShot):
                features.update(("/".join(Path(files.paths[i]).parts[-3:]), row) for i, row in zip(indices.tolist(), rows))
            yield indices, rows, inverted

    def stepping(self, batch, phase):
        batches.append(batch)
        return step(self, batch, phase)

    monkeypatch.setattr(Extractor, "stream", streaming)
    monkeypatch.setattr(method, "step", stepping)
    return features, batches


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    assert a.keys() == b.keys()
    return {name for name in a if not torch.allclose(a[name], b[name], atol=1e-4)}


def test_released_ucdr_adapter_reads_images_as_they_are(world, tmp_path, monkeypatch):
    """In training and evaluation: of two runs that differ in --image-reading, the transparent images alone differ."""
    root = Path(shutil.copytree(world, tmp_path / "world"))
    make_transparent(root / "data" / TRAINED, root / "data" / QUERIED)
    seen = []
    for name, more in READINGS.items():
        with monkeypatch.context() as patch:
            seen.append(noted(patch, UCDRAdapter))
            assert train.main(flags(root, tmp_path / name, "--variant", "released", "--source-epochs", "0", *more)) == 0
        assert json.loads((tmp_path / name / "config.json").read_text())["image_reading"] == name
    (features, batches), (upright_features, upright_batches) = seen
    assert {QUERIED} <= differing(features, upright_features) <= {QUERIED, TRAINED}
    changed = 0
    for ours, theirs in zip(batches, upright_batches, strict=True):
        assert torch.equal(ours.class_ids, theirs.class_ids) and torch.equal(ours.domain_ids, theirs.domain_ids)
        changed += int((ours.images != theirs.images).flatten(1).any(dim=1).sum())
    assert changed == 1  # one epoch


def test_released_sre_clip_reads_images_as_they_are(scene, tmp_path, monkeypatch):  # noqa: F811
    root = Path(shutil.copytree(scene, tmp_path / "scene"))
    make_transparent(root / TRAINED, root / QUERIED)
    seen = []
    for name, more in READINGS.items():
        with monkeypatch.context() as patch:
            seen.append(noted(patch, SRECLIP))
            assert train.main(sre_flags(root, tmp_path / name, "--variant", "released", "--sre-iterations", "12", *more)) == 0
    (features, batches), (upright_features, upright_batches) = seen
    assert differing(features, upright_features) == {TRAINED, QUERIED}
    for part, turned in (("source", TRAINED), ("target", QUERIED)):
        rows = [torch.cat([getattr(batch, part) for batch in found]) for found in (batches, upright_batches)]
        changed = (rows[0] - rows[1]).abs().amax(dim=1) > 1e-4
        assert changed.any() and not changed.all()
        assert torch.allclose(rows[0][changed], features[turned].expand(int(changed.sum()), -1), atol=1e-4)


def test_bf16_training_keeps_float32_weights(world, tmp_path, monkeypatch):
    """Steps and features are computed in bfloat16; losses are finite, and what is saved and evaluated is float32."""
    kinds = []
    step, encode = UCDRAdapter.step, UCDRAdapter.encode
    monkeypatch.setattr(UCDRAdapter, "step", lambda *a: kinds.append(("step", torch.is_autocast_enabled("cpu"))) or step(*a))
    monkeypatch.setattr(UCDRAdapter, "encode", lambda *a: kinds.append(("encode", torch.is_autocast_enabled("cpu"))) or encode(*a))
    run = tmp_path / "run"
    assert train.main(flags(world, run, "--precision", "bf16")) == 0
    assert set(kinds) == {("step", True), ("encode", True)}
    log = logged(run)
    losses = [line["loss"] for line in log if "loss" in line]
    assert {line["phase"] for line in log} == {"source", "target"} and losses and all(map(math.isfinite, losses))
    for name in ("best.pt", "last.pt"):
        weights = load_state(run / name)["method"]
        assert weights and {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float32}
    assert evaluate.main(["--run", str(run), "--out", str(tmp_path / "out"), "--workers", "0"]) == 0
    ours, theirs = (json.loads((folder / "results.json").read_text())["rows"] for folder in (run, tmp_path / "out"))
    assert ours == theirs and all(0 < row["mAP@all"] <= 1 for row in ours)
