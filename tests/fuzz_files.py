"""Mutated checkpoints, weights, configs, caches, graphs and splits: other bytes, and other values in sound files."""
from __future__ import annotations

import copy
import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.fuzzing import Harness, Trap, mutated, png, tidied
from tests.helpers import tiny_state_dict
from tests.weight_files import WRITERS, hostile_archives, hostile_safetensors
from ucdr_ref.clip.load import load_clip
from ucdr_ref.clip.tensorfile import file_digest
from ucdr_ref.config import Config, to_json
from ucdr_ref.experiments import protocols
from ucdr_ref.experiments import run_folder as runs
from ucdr_ref.experiments.experiment import restore
from ucdr_ref.images.cache import build_index
from ucdr_ref.machine.files import load_state
from ucdr_ref.sre.adapter import SRECLIP
from ucdr_ref.sre.adapter import Batch as SREBatch
from ucdr_ref.sre.graph import Graph, load_graph, normalised_adjacency
from ucdr_ref.sre.wordnet import read_classes, save_graph
from ucdr_ref.training.loop import Feed, Run, train
from ucdr_ref.ucdr.adapter import Batch, UCDRAdapter

NAMES = [f"shape {k}" for k in range(4)]
VALUES = (None, True, -1, 0, 1 << 40, 1 << 70, -0.5, float("nan"), float("inf"), "", "x\ny\x1b[31m", "a" * 5000, [], {}, (),
          [None], {"a": 1}, [[[]]])


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every place in nested dicts, lists and tuples."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def put(value: Any, path: tuple, change: Callable[[Any], Any]) -> Any:
    """A copy of `value` with `change` done at a place; `...` removes it."""
    if not path:
        return change(value)
    out = dict(value) if isinstance(value, dict) else list(value)
    new = put(out[path[0]], path[1:], change)
    if new is ...:
        del out[path[0]]
    else:
        out[path[0]] = new
    return tuple(out) if isinstance(value, tuple) else out


def other_value(old: Any, r: random.Random) -> Any:
    if isinstance(old, Tensor) and r.random() < 0.8:
        return r.choice((lambda t: t.flatten()[:0], lambda t: t.flatten(), lambda t: t[None], lambda t: t.double(),
                         lambda t: t.long(), lambda t: torch.full_like(t.double(), float("nan")), lambda t: -t - 1,
                         lambda t: t * 10**6, lambda t: torch.zeros(3), lambda t: torch.zeros(())))(old)
    if type(old) in (int, float) and r.random() < 0.4:
        return r.choice((old + 1, -old, old * 1000, old * 10**9, str(old), float(old)))
    return ... if r.random() < 0.2 else copy.deepcopy(r.choice(VALUES))


def other_state(state: dict, r: random.Random) -> tuple[str, dict]:
    path = r.choice(list(places(state)))
    new = other_value(None, r)

    def change(old: Any) -> Any:
        nonlocal new
        new = other_value(old, r)
        return new

    out = put(state, path, change)
    if r.random() < 0.1:
        out[r.choice((None, 3, "x", "\n"))] = new if new is not ... else 0
    return f"{path} = {repr(new)[:80]}", out


class Scene:
    """A run folder of each method, and one sound file of each kind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tower = {key: value for key, value in tiny_state_dict(vision_layers=1).items() if key.startswith("visual.")}
        torch.save(tower, folder / "clip.pt")
        self.clip = load_clip(folder / "clip.pt")
        self.device = torch.device("cpu")
        self.sha = file_digest(folder / "clip.pt")
        small = dict(weights=str(folder / "clip.pt"), dataset="folder", class_features="prototypes", queue_size=3, save_every=1,
                     target_epochs=1, sre_hidden=16, sre_batch=4, sre_bank=6, sre_iterations=3, sre_warmup=1)
        self.configs = {"ucdr": Config(**small), "sre": Config(method="sre-clip", **small)}  # type: ignore[arg-type]
        ids = [f"n{k:08d}" for k in range(6)]
        self.graph = Graph(ids, [*NAMES, "even", "odd"], [[name] for name in [*NAMES, "even", "odd"]],
                           [(k, 4 + k % 2) for k in range(4)], 4, "notice")
        self.states: dict[str, dict] = {}
        for name in self.configs:
            (folder / name).mkdir()
            self.train(name, folder / name)
            for file in ("best", "last"):
                self.states[f"{name}/{file}"] = load_state(folder / name / f"{file}.pt")
        small_clip = tiny_state_dict(vocab_size=40, context_length=8, vision_layers=1, text_layers=1, image_size=16)
        self.weights: dict[str, bytes] = {}
        for form, writer in WRITERS.items():
            writer(small_clip, folder / "weights")
            self.weights[form] = (folder / "weights").read_bytes()
        save_graph(self.graph, folder / "graph.json")
        self.texts = {"graph": (folder / "graph.json").read_bytes(), "config": to_json(self.configs["ucdr"]).encode(),
                      "split": json.dumps({"train": NAMES[:2], "val": NAMES[2:3], "test": NAMES[3:]}).encode(),
                      "classes": b"seen n00000001 shape 0\nunseen n00000002 shape 1\n# x\n"}
        (folder / "gallery").mkdir()
        for i in range(3):
            (folder / "gallery" / f"{i}.png").write_bytes(png(2, 2, data=bytes(14)))

    def method(self, name: str) -> UCDRAdapter | SRECLIP:
        torch.manual_seed(0)
        if name == "ucdr":
            return UCDRAdapter(self.clip, NAMES, ["photo", "sketch"], self.configs[name], torch.randn(4, self.clip.embed_dim))
        adjacency = normalised_adjacency(self.graph.edges, len(self.graph.ids))
        return SRECLIP(self.clip, NAMES, torch.randn(6, 8), adjacency, [1], self.configs[name])

    def train(self, name: str, run: Path) -> None:
        """As train.py does it, two batches a phase."""
        config, method = self.configs[name], self.method(name)
        extra = {**runs.describe(config, NAMES, ["photo", "sketch"], self.sha), "graph": self.graph.__dict__, "unseen_ids": [1],
                 "baseline": "prototypes", "anchors": torch.zeros(4, self.clip.embed_dim)}

        def load(epoch: int, left: Any) -> Iterator[tuple[Any, list[str]]]:
            for i in left:
                labels = torch.tensor([0, 2, 3, 0])
                if name == "sre":
                    yield SREBatch(torch.randn(4, 32), labels, torch.randn(4, 32), i), ["x"]
                else:
                    yield Batch(torch.randn(4, 3, 32, 32), labels, torch.tensor([0, 1, 0, 1])), ["x"]

        feed = Feed(1, lambda epoch: range(2 if name == "ucdr" else 3), load)
        with redirect_stderr(io.StringIO()):
            train(method, dict.fromkeys(method.PHASES, feed), None, Run(run, config, self.device, extra, 2))

    def write(self, name: str, content: bytes | dict) -> Path:
        path = self.folder / name
        if isinstance(content, dict):
            torch.save(content, path)
        else:
            path.write_bytes(content)
        return path

    def damaged(self, state: dict, r: random.Random) -> tuple[str, bytes | dict]:
        """A state dict with another value somewhere, or its file with other bytes."""
        if r.random() < 0.7:
            return other_state(state, r)
        stream = io.BytesIO()
        if r.random() < 0.1:
            torch.save(put(state, r.choice(list(places(state))), lambda old: Trap(str(self.folder / "executed"))), stream)
            return "trap", stream.getvalue()
        torch.save(state, stream)
        return mutated(stream.getvalue(), r)

    def damaged_text(self, kind: str, r: random.Random) -> tuple[str, bytes]:
        if r.random() < 0.6 and kind != "classes":
            what, values = other_state(json.loads(self.texts[kind]), r)
            return what, json.dumps({str(key): value for key, value in values.items()}, default=str).encode()
        if r.random() < 0.1:
            return "nested", b"[" * 100_000
        return mutated(self.texts[kind], r)


def fuzz_files(harness: Harness, folder: Path, count: int, seed: int) -> None:
    r, scene = random.Random(f"files/{seed}"), Scene(folder)
    cases = [case_best, case_last, case_weights, case_text, case_cache, case_best, case_last, case_text]
    for i in range(count):
        cases[i % len(cases)](harness, scene, i, r)
    for path in hostile_archives(folder, scene.weights["torchscript"]):
        harness.run("hostile archives", path.name, lambda path=path: load_clip(path), path.name)
        harness.run("hostile archives", path.name, lambda path=path: load_state(path), path.name)
    for name, (data, _) in hostile_safetensors().items():
        path = scene.write(f"{name}.safetensors", data)
        harness.run("hostile safetensors", name, lambda path=path: load_clip(path), path.name)
    fifo = folder / "fifo"
    os.mkfifo(fifo)
    readers: dict[str, Callable[[], object]] = {
        "load_clip": lambda: load_clip(fifo), "load_state": lambda: load_state(fifo),
        "read_config": lambda: runs.read_config(fifo), "load_graph": lambda: load_graph(fifo),
        "file_digest": lambda: file_digest(fifo),
        "read_classes": lambda: read_classes(fifo),
        "folder_split": lambda: protocols.folder_split(Config(class_split=str(fifo)), {})}
    for name, reader in readers.items():
        harness.run("FIFOs", name, reader, "fifo")
    assert not (folder / "executed").exists(), "code of a file was executed"


def case_best(harness: Harness, scene: Scene, i: int, r: random.Random) -> None:
    name = r.choice(("ucdr", "sre"))
    what, content = scene.damaged(scene.states[f"{name}/best"], r)
    scene.write("case/best.pt", content)
    harness.run("best.pt", f"{i} {name} {what}", lambda: restore(scene.folder / "case", {}, scene.device), str(scene.folder))


def case_last(harness: Harness, scene: Scene, i: int, r: random.Random) -> None:
    name = r.choice(("ucdr", "sre"))
    what, content = scene.damaged(scene.states[f"{name}/last"], r)
    shutil.copy(scene.folder / name / "log.jsonl", scene.folder / "case" / "log.jsonl")
    scene.write("case/last.pt", content)
    harness.run("last.pt", f"{i} {name} {what}", lambda: scene.train(name, scene.folder / "case"), "/case/")
    for path in (scene.folder / "case").iterdir():
        path.unlink()


def case_weights(harness: Harness, scene: Scene, i: int, r: random.Random) -> None:
    form = r.choice(sorted(scene.weights))
    what, data = mutated(scene.weights[form], r)
    path = scene.write(f"weights{i}", data)
    harness.run("weights", f"{i} {form} {what}", lambda: load_clip(path), path.name)
    path.unlink()


def case_text(harness: Harness, scene: Scene, i: int, r: random.Random) -> None:
    kind = r.choice(sorted(scene.texts))
    what, data = scene.damaged_text(kind, r)
    path = scene.write(f"{kind}{i}", data)
    tree = {"photo": {name: ["x"] for name in NAMES}, "sketch": {name: ["y"] for name in NAMES}}
    config = replace(scene.configs["ucdr"], class_split=str(path), data_root="data")
    readers: dict[str, Callable[[], object]] = {
        "graph": lambda: load_graph(path), "config": lambda: runs.read_config(path), "classes": lambda: read_classes(path),
        "split": lambda: protocols.folder_split(config, tree)}
    harness.run(kind, f"{i} {what}", lambda: tidied(readers[kind]), path.name)
    path.unlink()


def case_cache(harness: Harness, scene: Scene, i: int, r: random.Random) -> None:
    """A cache entry that is not sound is never used: the rows are those of the encoder."""
    cache, rows = scene.folder / "cache", torch.arange(12.0).view(3, 4)

    def build() -> None:
        encode = lambda paths: [(torch.arange(3), rows)]  # noqa: E731
        index = build_index(scene.folder / "gallery", encode, "model", cache, say=lambda line: None)
        assert np.array_equal(index.features, rows.numpy()) and index.paths == ["0.png", "1.png", "2.png"]

    build()
    path = r.choice(sorted(path for path in cache.glob("*/*")))
    what, data = mutated(path.read_bytes(), r)
    if r.random() < 0.2 and path.suffix == ".npy":
        what, data = "trap", pickle.dumps(Trap(str(scene.folder / "executed")))
        stream = io.BytesIO()
        np.save(stream, np.array([Trap(str(scene.folder / "executed"))], dtype=object), allow_pickle=True)
        data = stream.getvalue()
    path.write_bytes(data)
    harness.run("caches", f"{i} {path.name} {what}", build)
