"""Parts of the package, copied under another name, do their work alone."""
import shutil
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "ucdr_ref"
CLIP = """
import torch
torch.manual_seed(0)
from theirs.clip import ZeroShot, class_text_features, load_clip, preprocess, tokenize
from PIL import Image
clip = load_clip(str(world / "clip.pt"))  # a path as text will do
image = preprocess(clip.image_size)(Image.open(world / "data/photo/shape_5/0.png").convert("RGB"))[None]
assert clip.encode_image(image).shape == clip.encode_text(tokenize(["a photo of a shape"])).shape == (1, 32)
assert ZeroShot(clip).encode(image).norm() > 0.99 and class_text_features(clip, ["shape", "t_shirt"]).shape == (2, 32)
"""
STEPS = """
def steps(method, batch, phase):
    parameters = method.trainable(phase)
    method.start(phase)
    optimizer = method.optimizer(phase)
    before = {name: value.detach().clone() for name, value in parameters.items()}
    for _ in range(2):
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.zero_grad()
        method.step(batch, phase)["loss"].backward()
        optimizer.step()
    assert any(not torch.equal(before[name], value) for name, value in parameters.items()), phase
"""
UCDR = CLIP + STEPS + """
from theirs.ucdr.adapter import Batch, UCDRAdapter
from theirs.ucdr.closed_form import ClosedFormAdapter, measure
from theirs.ucdr.options import Options
form = measure(torch.randn(8, 32), torch.arange(8) % 2, torch.arange(8) // 4, 2).form(3.0)
assert ClosedFormAdapter(clip, form).encode(image).shape == (1, 32)
method = UCDRAdapter(clip, ["square", "circle"], ["photo", "sketch"], Options(context_vectors=4))
batch = Batch(image.repeat(4, 1, 1, 1), torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1]))
for phase in method.PHASES:
    steps(method, batch, phase)
assert method.text_features().shape == (2, 32) and method.encode(image).shape == (1, 32)
"""
SRE = CLIP + STEPS + """
from theirs.sre.adapter import Batch, SRECLIP
from theirs.sre.graph import normalized_adjacency
from theirs.sre.options import Options
vectors = torch.nn.functional.normalize(torch.randn(4, 6), dim=1)
adjacency = normalized_adjacency([(0, 3), (1, 3), (2, 3)], 4)
options = Options(sre_hidden=16, sre_warmup=1)
method = SRECLIP(clip, ["cat", "dog", "owl"], vectors, adjacency, [2], options)
steps(method, Batch(torch.randn(4, 32), torch.tensor([0, 1, 0, 1]), torch.randn(4, 32), 0), "sre")
assert method.logits(torch.randn(5, 32)).shape == (5, 3) and method.encode(image).shape == (1, 16)
"""
METRICS = """
import torch
from theirs import metrics
query, gallery = torch.eye(3)[:2], torch.eye(3)
found = metrics.retrieval(query, torch.tensor([0, 1]), gallery, torch.tensor([0, 1, 2]), k=2)
assert found["mAP@2"] == 1.0
assert metrics.search(query, gallery, 1)[1].tolist() == [[0], [1]]
predicted = torch.tensor([[0, 2], [1, 2], [2, 2]])
assert metrics.zero_shot_accuracy(predicted, predicted[:, 0], torch.tensor([2]))["instance"]["h"] == 1.0
"""
WHOLE = """
import json, torch
from pathlib import Path
from theirs.cli import load_state
from theirs.config import resolve
from theirs.data.benchmarks import build_protocol
from theirs.data.features import load_index
from theirs.experiments import experiment
from theirs.metrics import search

flags = {"dataset": "folder", "data_root": str(world / "data"), "weights": str(world / "clip.pt"), "workers": 0,
         "class_split": str(world / "split.json"), "source_batch": 20, "target_batch": 20, "source_epochs": 1,
         "target_epochs": 1, "context_vectors": 4, "device": "cpu"}
config, run, device = resolve(flags), Path("run"), torch.device("cpu")
experiment.train(config, run, Path("cache"))
steps = [json.loads(line)["phase"] for line in (run / "log.jsonl").read_text().splitlines()]
assert {"source", "target"} <= set(steps)
assert build_protocol(config).class_names == load_state(run / "best.pt")["class_names"]
config, method, state = experiment.restore(run, {}, device)
index = load_index(world / "data/photo", method, config, "model", Path("cache"))
distances, rows = search(index.features[3:4], index.features, 3)
assert rows[0, 0] == 3 and distances[0, 0] < 1e-3
"""

@pytest.mark.parametrize("parts, use", [
    (["clip", "metrics.py"], CLIP + METRICS), (["clip", "ucdr"], UCDR), (["clip", "sre"], SRE), ([], WHOLE)],
    ids=["clip and metrics", "clip and ucdr", "clip and sre", "all but demo and bench"])
def test_a_copy_under_another_name_works_alone(parts, use, world, tmp_path, monkeypatch):
    copy = tmp_path / "theirs"
    if parts:
        copy.mkdir()
    for part in parts:
        source = PACKAGE / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / part)
    if not parts:
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "demo", "bench"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "ucdr_ref"]:
        monkeypatch.setitem(sys.modules, name, None)  # now none of it can be imported
    try:
        exec(use, {"world": world})
    finally:
        theirs = [sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] == "theirs"]
    assert theirs and all(Path(module.__file__).is_relative_to(tmp_path) for module in theirs if module.__file__)
