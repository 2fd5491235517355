"""The package alone, copied under another name, does everything; and what it imports."""
from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "ucdr_ref"
ALLOWED = {"torch", "torchvision", "PIL", "numpy"} | set(sys.stdlib_module_names)

USE = """
import json, sys
from dataclasses import replace
from functools import partial
from pathlib import Path
import torch
torch.set_num_threads(1)
before = set(sys.modules)
from theirs import config
from theirs.experiments import protocols, retrieval
from theirs.images import features
from theirs.training import loop as engine
from theirs.clip import tokenizer
from theirs.machine.files import load_state
from theirs.clip import load_clip, preprocess
from theirs.images.batches import open_image
from theirs.images.cache import build_index
from theirs.experiments.run_folder import describe, restore
from theirs.ucdr.adapter import UCDRAdapter

world, device = Path(sys.argv[1]), torch.device("cpu")
clip = load_clip(world / "clip.pt")
image = preprocess(clip.image_size)(open_image(str(world / "data/photo/shape_5/0.png")))[None]
assert clip.encode_image(image).shape == (1, 32)
assert clip.encode_text(tokenizer.tokenize(["a photo of a shape"])).shape == (1, 32)

chosen = config.resolve({"dataset": "folder", "data_root": str(world / "data"), "weights": str(world / "clip.pt"), "workers": 0,
                         "class_split": str(world / "split.json"), "source_batch": 20, "target_batch": 20, "target_epochs": 1,
                         "context_vectors": 4})
protocol = protocols.build(chosen)
method = UCDRAdapter(clip, protocol.class_names, protocol.domain_names, chosen)
start = {name: value.clone() for name, value in engine.own_state(method).items()}
feeds = {phase: retrieval.feed(phase, protocol, chosen, clip.image_size, device) for phase in method.PHASES}
for phase in feeds:
    whole = feeds[phase].order
    feeds[phase].order = lambda epoch, whole=whole: whole(epoch)[:2]
run = Path("run")
run.mkdir()
extra = describe(chosen, protocol.class_names, protocol.domain_names, "none")
engine.train(method, feeds, None, engine.Run(run, chosen, device, extra))
steps = [json.loads(line)["phase"] for line in (run / "log.jsonl").read_text().splitlines()]
trained = load_state(run / "best.pt")["method"]
moved = {name.split(".")[0] for name in start if not torch.equal(trained[name], start[name])}

_, adapted, state = restore(run, {"weights": str(world / "clip.pt")}, device)
encode = features.path_encoder(adapted.encode, clip.image_size, chosen, device)
index = build_index(world / "data/photo", encode, "model", "cache")
query = str(world / "data/photo/shape_5/0.png")
distances, rows = index.search(torch.cat([part for _, part in encode([query])]), 3)
print(json.dumps({"steps": steps, "moved": sorted(moved), "found": index.path(int(rows[0, 0])),
                  "distance": float(distances[0, 0]), "query": query,
                  "files": [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "theirs"],
                  "ours": [name for name in sys.modules if name.split(".")[0] == "ucdr_ref"]}))
"""


def test_a_copy_under_another_name_encodes_trains_and_retrieves(world, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "theirs", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", USE, str(world)], cwd=tmp_path, capture_output=True, text=True, timeout=900,
                          env={**environment, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["steps"] == ["source"] * 2 + ["target"] * 2
    assert set(said["moved"]) >= {"template", "domain_prompts", "class_prompts", "generator", "class_token", "proj"}
    assert os.path.samefile(said["found"], said["query"]) and said["distance"] < 1e-3
    assert not said["ours"] and all(Path(file).is_relative_to(tmp_path) for file in said["files"])


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_imports(path):
    allowed = ALLOWED | ({"open_clip", "faiss"} if path.parent.name == "bench" else set())  # peers that are measured beside
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] in allowed for alias in node.names), ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            inside = node.level == 1 if path.parent == PACKAGE else 1 <= node.level <= 2
            assert inside or (node.level == 0 and str(node.module).split(".")[0] in allowed), ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module", "exec", "eval"):
            raise AssertionError(ast.unparse(node))
