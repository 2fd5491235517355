"""Mutated checkpoints, weights, configs, caches, run folders and names: other bytes, other values, other kinds of file."""
from __future__ import annotations

import copy
import gzip
import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.fuzzing import Harness, Trap, mutated, png, tidied
from tests.helpers import tiny_state_dict
from tests.weight_files import SMALL, WRITERS, equal, rewrite
from ucdr_ref import __version__
from ucdr_ref.clip.load import load_clip
from ucdr_ref.clip.tensorfile import file_digest
from ucdr_ref.config import Config, to_json
from ucdr_ref.experiments import class_folders, classification, protocols, ranking, report, retrieval, trees
from ucdr_ref.experiments import run_folder as runs
from ucdr_ref.experiments.experiment import restore
from ucdr_ref.experiments.page import log_lines
from ucdr_ref.images.batches import Files, open_image
from ucdr_ref.images.cache import build_index
from ucdr_ref.machine.files import load_state
from ucdr_ref.sre.adapter import SRECLIP
from ucdr_ref.sre.adapter import Batch as SREBatch
from ucdr_ref.sre.graph import Graph, load_graph, normalized_adjacency, read_vectors, save_graph
from ucdr_ref.sre.wordnet import read_classes
from ucdr_ref.training.journal import open_log
from ucdr_ref.training.loop import Feed, Run, train
from ucdr_ref.ucdr.adapter import Batch, UCDRAdapter

NAMES = [f"shape {k}" for k in range(4)]
CACHED = torch.arange(12.0).view(3, 4)  # the features of a gallery
RECORD_READERS: dict[str, Callable[[Path], object]] = {
    "run.json": runs.recorded_files, "log.jsonl": log_lines, classification.SCORES: classification.best_scores,
    runs.LISTING: runs.remembered}


def repeated(make: Callable[[Any], Any], count: int) -> Any:
    value: Any = []
    for _ in range(count):
        value = make(value)
    return value


# Little to write, endless to walk, to print or to hash.
ENDLESS = (repeated(lambda x: [x, x], 60), repeated(lambda x: (x, x), 60), repeated(lambda x: {"a": x, "b": x}, 60),
           repeated(lambda x: [x], 100), {k * (2**61 - 1): 0 for k in range(1, 1000)}, [["a" * 10_000] * 2000])
VALUES = (None, True, -1, 0, 1 << 40, 1 << 70, -0.5, float("nan"), float("inf"), "", "x\ny\x1b[31m", "a" * 5000,
          [], {}, (), [None], {"a": 1}, [[[]]])


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


def other_value(old: Any, r: random.Random, endless: bool) -> Any:
    if isinstance(old, Tensor) and r.random() < 0.8:
        return r.choice((lambda t: t.flatten()[:0], lambda t: t.flatten(), lambda t: t[None], lambda t: t.double(),
                         lambda t: t.long(), lambda t: torch.full_like(t.double(), float("nan")), lambda t: -t - 1,
                         lambda t: t * 10**6, lambda t: torch.zeros(3), lambda t: torch.zeros(())))(old)
    if type(old) in (int, float) and r.random() < 0.4:
        return r.choice((old + 1, -old, old * 1000, old * 10**9, str(old), float(old)))
    return ... if r.random() < 0.2 else copy.deepcopy(r.choice(ENDLESS if endless and r.random() < 0.05 else VALUES))


def other_state(state: dict, r: random.Random, endless: bool = True) -> tuple[str, dict]:
    """What was done, and the state with another value. endless: may be one of ENDLESS, which text cannot hold."""
    path = r.choice(list(places(state)))
    new = other_value(None, r, False)

    def change(old: Any) -> Any:
        nonlocal new
        new = other_value(old, r, endless)
        return new

    out = put(state, path, change)
    if r.random() < 0.1:
        out[r.choice((None, 3, "x", "\n"))] = new if new is not ... else 0
    return f"{path} = {type(new).__name__ if isinstance(new, (dict, list, tuple)) else repr(new)[:80]}", out


class Scene:
    """A run folder of each method, and one sound file of each kind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tower = {key: value for key, value in tiny_state_dict(vision_layers=1).items() if key.startswith("visual.")}
        torch.save(tower, folder / "clip.pt")
        self.clip = load_clip(folder / "clip.pt")
        self.device = torch.device("cpu")
        self.sha = file_digest(folder / "clip.pt")
        small = dict(weights=str(folder / "clip.pt"), dataset="folder", class_features="prototypes", save_every=1,
                     target_epochs=1, sre_hidden=16, sre_iterations=3, sre_warmup=1)
        self.configs = {"ucdr": Config(**small), "sre": Config(method="sre-clip", **small)}  # type: ignore[arg-type]
        ids = [f"n{k:08d}" for k in range(6)]
        self.graph = Graph(ids, [*NAMES, "even", "odd"], [[name] for name in [*NAMES, "even", "odd"]],
                           [(k, 4 + k % 2) for k in range(4)], 4, "notice")
        self.states: dict[str, dict] = {}
        for name in self.configs:
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(to_json(self.configs[name]))
            self.train(name, folder / name)
            for file in ("best", "last"):
                self.states[f"{name}/{file}"] = load_state(folder / name / f"{file}.pt")
        self.small_clip = tiny_state_dict(**SMALL)
        self.weights: dict[str, bytes] = {}
        for form, writer in WRITERS.items():
            writer(self.small_clip, folder / "weights")
            self.weights[form] = (folder / "weights").read_bytes()
        save_graph(self.graph, folder / "graph.json")
        self.texts = {"graph": (folder / "graph.json").read_bytes(), "config": to_json(self.configs["ucdr"]).encode(),
                      "split": json.dumps({"train": NAMES[:2], "val": NAMES[2:3], "test": NAMES[3:]}).encode(),
                      "classes": b"seen n00000001 shape 0\nunseen n00000002 shape 1\n# x\n"}
        scores = {average: dict.fromkeys(classification.COLUMNS, 0.5) for average in ("instance", "class")}
        self.records = {"run.json": b'{"files": {"train": "0"}}', "log.jsonl": (folder / "ucdr" / "log.jsonl").read_bytes(),
                        classification.SCORES: 2 * (json.dumps(scores) + "\n").encode(),
                        runs.LISTING: gzip.compress(b'{"data": ["photo/shape 0/x.png"]}', mtime=0)}
        np.save(folder / "anchors.npy", np.ones((4, self.clip.embed_dim), np.float32))
        self.anchors = (folder / "anchors.npy").read_bytes()
        (folder / "gallery").mkdir()
        for i in range(3):
            (folder / "gallery" / f"{i}.png").write_bytes(png(2, 2, data=bytes(14)))

    def method(self, name: str) -> UCDRAdapter | SRECLIP:
        torch.manual_seed(0)
        if name == "ucdr":
            return UCDRAdapter(self.clip, NAMES, ["photo", "sketch"], self.configs[name], torch.randn(4, self.clip.embed_dim))
        adjacency = normalized_adjacency(self.graph.edges, len(self.graph.ids))
        return SRECLIP(self.clip, NAMES, torch.randn(6, 8), adjacency, [1], self.configs[name])

    def train(self, name: str, run: Path) -> None:
        """As train.py does it, two batches a phase."""
        config, method = self.configs[name], self.method(name)
        extra = {"config": asdict(config), "class_names": NAMES, "domain_names": ["photo", "sketch"],
                 "weights_sha256": self.sha, "version": __version__, "graph": self.graph.__dict__, "unseen_ids": [1],
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
            what, values = other_state(json.loads(self.texts[kind]), r, endless=False)
            return what, json.dumps({str(key): value for key, value in values.items()}, default=str).encode()
        if r.random() < 0.1:
            return "nested", b"[" * 100_000
        return mutated(self.texts[kind], r)


def fuzz_files(harness: Harness, folder: Path, count: int, seed: int) -> None:
    r, scene = random.Random(f"files/{seed}"), Scene(folder)
    sound_files(harness, scene)
    cases = [case_best, case_last, case_weights, case_text, case_cache, case_best, case_last, case_text, case_record, case_folder,
             case_anchors, case_names]
    for i in range(count):
        cases[i % len(cases)](harness, scene, i, r)
    special_files(harness, scene)
    assert not (folder / "executed").exists(), "code of a file was executed"


def sound_files(harness: Harness, scene: Scene) -> None:
    """What the cases damage, undamaged: it is read, and as what was written."""
    def expect(kind: str, case: str, read: Callable[[], object], expected: object) -> None:
        def check() -> None:
            found = read()
            assert found == expected, f"{found} instead of {expected}"

        harness.sound(kind, case, check)

    for name in scene.configs:
        expect("best.pt", name, lambda name=name: restore(scene.folder / name, {}, scene.device)[2]["class_names"], NAMES)
        shutil.copytree(scene.folder / name, scene.folder / "sound")
        harness.sound("last.pt", name, lambda name=name: scene.train(name, scene.folder / "sound"))
        shutil.rmtree(scene.folder / "sound")
    for form in scene.weights:
        path = scene.write("sound", scene.weights[form])
        expect("weights", form, lambda path=path: equal(load_clip(path), scene.small_clip), True)
        if form in ("zip", "torchscript"):
            rewrite(path, lambda name, old: old)
            expect("pickles", form, lambda path=path: equal(load_clip(path), scene.small_clip), True)
    values = {"graph": scene.graph, "config": scene.configs["ucdr"], "split": json.loads(scene.texts["split"]),
              "classes": [("seen", "n00000001", "shape 0"), ("unseen", "n00000002", "shape 1")]}
    for kind, value in values.items():
        path = scene.write("sound", scene.texts[kind])
        expect(kind, "sound", lambda kind=kind, path=path: text_readers(scene, path)[kind](), value)
    scores = {average: dict.fromkeys(classification.COLUMNS, 0.5) for average in classification.AVERAGES}
    log = [json.loads(line) for line in scene.records["log.jsonl"].splitlines()]
    records = {"run.json": {"train": "0"}, "log.jsonl": log, classification.SCORES: (2, scores),
               runs.LISTING: {"data": ["photo/shape 0/x.png"]}}
    for name, value in records.items():
        path = scene.write(f"case/{name}", scene.records[name])
        expect(f"records {name}", "sound", lambda name=name, path=path: RECORD_READERS[name](path.parent), value)
        path.unlink()
    build_cache(scene)
    harness.sound("caches", "sound", lambda: build_cache(scene, lambda paths: pytest.fail("a sound entry is not used")))
    shutil.copytree(scene.folder / "ucdr", scene.folder / "received")
    harness.sound("run folders", "sound", lambda: resume(scene, scene.folder / "received"))
    shutil.rmtree(scene.folder / "received")
    path = scene.write("sound", scene.anchors)
    harness.sound("class features", "sound", lambda: anchors(scene, path))
    path.unlink()


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

    def read() -> None:
        model = load_clip(path)
        assert all(value.isfinite().all() for value in model.parameters())
        assert what not in ("cut", "empty"), "a part of a file is none"
        # A zip archive carries checksums: one changed bit is noticed or harmless.
        assert what != "flip" or form not in ("zip", "torchscript") or equal(model, scene.small_clip)

    harness.run("weights", f"{i} {form} {what}", read, path.name)
    if form in ("zip", "torchscript"):  # a program that the checksum does not catch
        path.write_bytes(scene.weights[form])
        rewrite(path, lambda name, old: other_program(old, r) if name.endswith("/data.pkl") else old)
        what = "program"
        harness.run("pickles", f"{i} {form}", read, path.name)
    path.unlink()


def other_program(data: bytes, r: random.Random) -> bytes:
    """A few bytes of a pickle changed, removed, inserted or repeated, or an instruction put in."""
    out = bytearray(data)
    for _ in range(r.randint(1, 4)):
        where, length = r.randrange(len(out)), r.randint(1, 30)
        instruction = r.choice([b"\xff\xff\xff\x7f", b"R", b"b", b"s", b"h\0", b"\x81"])
        out[where:where + r.choice([0, 1, length])] = r.choice(
            [b"", r.randbytes(1), bytes(out[where:where + length]), instruction])
    return bytes(out)


def case_text(harness: Harness, scene: Scene, i: int, r: random.Random) -> None:
    kind = r.choice(sorted(scene.texts))
    what, data = scene.damaged_text(kind, r)
    path = scene.write(f"{kind}{i}", data)
    harness.run(kind, f"{i} {what}", lambda: tidied(text_readers(scene, path)[kind]), path.name)
    path.unlink()


def text_readers(scene: Scene, path: Path) -> dict[str, Callable[[], object]]:
    tree = {"photo": {name: ["x"] for name in NAMES}, "sketch": {name: ["y"] for name in NAMES}}
    config = replace(scene.configs["ucdr"], class_split=str(path), data_root="data")
    return {"graph": lambda: load_graph(path), "config": lambda: runs.read_config(path), "classes": lambda: read_classes(path),
            "split": lambda: protocols.folder_split(config, tree)}


def case_cache(harness: Harness, scene: Scene, i: int, r: random.Random) -> None:
    """A cache entry that is not sound is never used: the rows are those of the encoder."""
    build_cache(scene)
    path = r.choice(sorted((scene.folder / "cache").glob("*/*")))
    what, data = mutated(path.read_bytes(), r)
    if r.random() < 0.2 and path.suffix == ".npy":
        what, data = "trap", pickle.dumps(Trap(str(scene.folder / "executed")))
        stream = io.BytesIO()
        np.save(stream, np.array([Trap(str(scene.folder / "executed"))], dtype=object), allow_pickle=True)
        data = stream.getvalue()
    path.write_bytes(data)
    harness.run("caches", f"{i} {path.name} {what}", lambda: build_cache(scene))


def build_cache(scene: Scene, encode: Any = lambda paths: [(torch.arange(3), CACHED)]) -> None:
    index = build_index(scene.folder / "gallery", encode, "model", scene.folder / "cache", say=lambda line: None)
    assert np.array_equal(index.features, CACHED.numpy()) and index.paths == ["0.png", "1.png", "2.png"]


def case_record(harness: Harness, scene: Scene, i: int, r: random.Random) -> None:
    """What a run folder notes beside its weights."""
    name = r.choice(sorted(scene.records))
    data = scene.records[name]
    if name == runs.LISTING and r.random() < 0.5:
        what, changed = mutated(gzip.decompress(data), r)
        data = gzip.compress(changed, mtime=0)
    else:
        what, data = mutated(data, r)
    path = scene.write(f"case/{name}", data)
    harness.run(f"records {name}", f"{i} {what}", lambda: RECORD_READERS[name](path.parent), name)
    path.unlink()


def case_folder(harness: Harness, scene: Scene, i: int, r: random.Random) -> None:
    """A run folder with one entry of another kind: nothing outside it is written, cut or waited for."""
    run, victim = scene.folder / "received", scene.folder / "victim"
    shutil.copytree(scene.folder / "ucdr", run)
    victim.write_text("precious")
    name = r.choice((".lock", "config.json", "run.json", "log.jsonl", "last.pt", "best.pt", "results.json", "report.html",
                     classification.SCORES, runs.LISTING, "features", f".best.pt.{os.getpid()}.tmp", ".last.pt.1.tmp"))
    kind = r.choice(("link", "dangling", "loop", "hard link", "fifo", "folder", "kernel"))
    path = run / name
    path.unlink(missing_ok=True)
    targets = {"link": victim, "dangling": scene.folder / "nowhere", "loop": path, "kernel": "/proc/kmsg"}
    if kind in targets:
        path.symlink_to(targets[kind])
    elif kind == "hard link":
        os.link(victim, path)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    harness.run("run folders", f"{i} {name} {kind}", lambda: tidied(lambda: resume(scene, run)), str(run))
    assert victim.read_text() == "precious" and not (scene.folder / "nowhere").exists(), f"{name} {kind}"
    shutil.rmtree(run)


def resume(scene: Scene, run: Path) -> None:
    with runs.open_run(run, scene.configs["ucdr"], {"weights_sha256": scene.sha, "files": {}}, {"data": []}):
        scene.train("ucdr", run)
        restore(run, {}, scene.device)


def case_anchors(harness: Harness, scene: Scene, i: int, r: random.Random) -> None:
    """Class features whose header or content is another one."""
    what, data = mutated(scene.anchors, r)
    if r.random() < 0.5:
        what, stream = "header", io.BytesIO()
        shape = tuple(r.choice((0, 4, 32, 10**9, 1 << 40, 1 << 62)) for _ in range(r.randint(0, 3)))
        described = {"descr": r.choice(("<f4", ">f8", "<c8", "<i8", "|O", "<U4", "|b1")), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, described)
        data = stream.getvalue() + bytes(r.choice((0, 512, 4096)))
    path = scene.write(f"anchors{i}.npy", data)
    harness.run("class features", f"{i} {what}", lambda: anchors(scene, path), path.name)
    path.unlink()


def anchors(scene: Scene, path: Path) -> None:
    config = replace(scene.configs["ucdr"], class_features=str(path))
    encoder = SimpleNamespace(method=SimpleNamespace(clip=scene.clip), device=scene.device)
    found = retrieval.class_anchors(config, SimpleNamespace(class_names=NAMES), encoder)  # type: ignore[arg-type]
    assert found is not None and found.shape == (4, scene.clip.embed_dim) and found.isfinite().all() and found.any(dim=1).all()


def case_names(harness: Harness, scene: Scene, i: int, r: random.Random) -> None:
    """Names with whatever a file system allows: a table keeps its lines, and steers no terminal."""
    def name() -> str:
        return "".join(r.choice("ab \x1b[31m\n\r\t\x07\x9b\u202e\udcff=+@-;") for _ in range(r.randint(1, 12)))

    accuracies = {average: dict.fromkeys(classification.COLUMNS, r.random()) for average in ("instance", "class")}
    numbers = {**dict.fromkeys(("queries", "gallery", "k", "k_used"), 1), **dict.fromkeys(ranking.COLUMNS, 0.5)}
    row = {"protocol": "UCDR", "query_domain": name(), "gallery_name": "unseen", "method": name(), "transductive": False,
           "unreadable": 0, "no_relevant": 0, **numbers}
    files = Files(["x"], [name()], [name()])
    test = protocols.Test("UCDR", name(), files, {"unseen": files})
    protocol = protocols.Protocol("data", [name()], [name()], files, None, [test], name())
    folder = class_folders.Folder(name(), files, [0] * len(files))
    classified = {"method": name(), "images": 1, "classes": 1, **accuracies}
    texts: dict[str, tuple[Callable[[], str], int]] = {  # and the lines they have
        "retrieval table": (lambda: ranking.table([row], scene.configs["ucdr"]), 2),
        "classification table": (lambda: classification.table([classified], scene.configs["sre"]), 3),
        "summary": (lambda: retrieval.summary(protocol), 2),
        "folders": (lambda: class_folders.summary([folder], [folder], scene.graph, [1]), 4),
        "cell": (lambda: report.cell(name()), 1)}
    what = r.choice(sorted(texts))

    def check() -> None:
        make, lines = texts[what]
        text = make()
        assert text.count("\n") == lines - 1 and text.replace("\n", "").isprintable(), text

    harness.sound("names", f"{i} {what}", check)


def special_files(harness: Harness, scene: Scene) -> None:
    """Everywhere a path is read: a FIFO, a file of the kernel's that never ends, a link to it, a folder, a link to itself."""
    folder = scene.folder / "special"
    folder.mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "folder").mkdir()
    for name, target in (("kernel", "/proc/kmsg"), ("loop", "loop"), ("dangling", "nowhere"), ("zero", "/dev/zero")):
        (folder / name).symlink_to(target)
    readers: dict[str, Callable[[Path], object]] = {
        "load_clip": load_clip, "load_state": load_state, "read_config": runs.read_config, "read_json": runs.read_json,
        "read_lines": runs.read_lines, "file_digest": file_digest, "load_graph": load_graph, "read_classes": read_classes,
        "open_image": lambda path: open_image(str(path)), "class_anchors": lambda path: anchors(scene, path),
        "read_table": lambda path: read_vectors(path, scene.graph), "open_log": lambda path: opened(path),
        "folder_split": lambda path: protocols.folder_split(Config(class_split=str(path)), {})}
    sound = {"load_clip": "clip.pt", "load_state": "ucdr/best.pt", "read_config": "ucdr/config.json",
             "read_json": "ucdr/config.json", "read_lines": "ucdr/log.jsonl", "file_digest": "clip.pt", "load_graph": "graph.json",
             "read_classes": "classes.txt", "open_image": "gallery/0.png", "class_anchors": "anchors.npy",
             "read_table": "table.txt", "open_log": "opened", "folder_split": "split.json"}
    scene.write("classes.txt", scene.texts["classes"])
    scene.write("table.txt", b"a 1 2\n")
    scene.write("opened", b"")
    scene.write("split.json", b'{"train": [], "val": [], "test": []}')
    for name, reader in readers.items():
        harness.sound("special files", f"{name} sound", lambda reader=reader, name=name: reader(scene.folder / sound[name]))
    for path in sorted(folder.iterdir()):
        for name, reader in readers.items():
            if (name, path.name) != ("open_log", "dangling"):  # see `case_folder`
                harness.run("special files", f"{name} {path.name}", lambda reader=reader, path=path: reader(path), path.name)
    for part in ("files.json.gz", "photo_train.txt"):
        os.mkfifo(folder / part)
    harness.run("special files", "remembered", lambda: runs.remembered(folder), runs.LISTING)
    harness.run("special files", "only_listed", lambda: trees.only_listed({"photo": {}}, "data", str(folder)), "photo_train.txt")


def opened(path: Path) -> None:
    with open_log(path, 0):
        pass
