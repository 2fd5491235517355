from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.testing import assert_close

from tests.helpers import Width, tiny_state_dict
from ucdr_ref.clip.model import CLIP
from ucdr_ref.clip.zero_shot import preprocess
from ucdr_ref.config import Config, resolve
from ucdr_ref.demo.drawing import CLASSES, SPLIT
from ucdr_ref.experiments import class_folders as sre_data
from ucdr_ref.experiments import predictions
from ucdr_ref.experiments.class_folders import Features
from ucdr_ref.images.batches import open_image
from ucdr_ref.metrics import zero_shot_accuracy
from ucdr_ref.sre.adapter import SRECLIP
from ucdr_ref.sre.graph import Graph, load_graph, save_graph
from ucdr_ref.sre.wordnet import WordNet, build_graph, read_classes

GRAPH = Graph(["n00000001", "n00000002", "n00000003", "n00000004"], ["killer whale", "t-shirt", "cow", "animal"],
              [["orca"], ["tee"], ["cow"], ["animal"]], [(0, 3), (2, 3)], 3, "")


def image_folder(root: Path, *names: str) -> str:
    for k, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (36, 40), (40 * k % 256, 90, 200 - 30 * k % 200)).save(path)
    return str(root)


@pytest.fixture
def graph_file(tmp_path: Path) -> str:
    save_graph(GRAPH, tmp_path / "graph.json")
    return str(tmp_path / "graph.json")


# batches

def test_every_pass_visits_an_image_at_most_once_and_iterations_are_independent() -> None:
    batches = [sre_data.draw(23, 5, i, 7, "source") for i in range(12)]
    for turn in range(3):
        of_pass = torch.cat(batches[4 * turn:4 * turn + 4]).tolist()
        assert len(of_pass) == len(set(of_pass)) == 20 and set(of_pass) <= set(range(23))
    assert len({tuple(batch.tolist()) for batch in batches}) == 12
    sre_data.shuffled.cache_clear()
    assert_close(sre_data.draw(23, 5, 9, 7, "source"), batches[9])
    assert not torch.equal(sre_data.draw(23, 5, 9, 8, "source"), batches[9])
    assert sorted(sre_data.draw(4, 5, 3, 7, "source").tolist()) == [0, 1, 2, 3]  # fewer images than a batch


def test_rows_come_from_the_right_part() -> None:
    parts = [np.arange(6, dtype=np.float32).reshape(3, 2), np.arange(100, 108, dtype=np.float32).reshape(4, 2)]
    features = Features(parts, [str(k) for k in range(7)], torch.zeros(7, dtype=torch.long))
    indices = torch.tensor([6, 0, 3, 3, 2])
    assert_close(features.take(indices), torch.from_numpy(np.concatenate(parts))[indices])


def small_batches(batch: int) -> type[Config]:
    return type("Small", (Config,), {"sre_batch": batch})


def test_feed_covers_all_iterations_and_goes_on_anywhere() -> None:
    rows = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    source, target = (Features([x], [f"{k}.png" for k in range(9)], torch.arange(9)) for x in (rows, rows + 100))
    feed = sre_data.feed(source, target, small_batches(4)(sre_iterations=230), torch.device("cpu"))
    assert feed.epochs == 3 and [i for epoch in range(3) for i in feed.order(epoch)] == list(range(230))
    whole = list(feed.load(1, feed.order(1)))
    for (ours, paths), (theirs, _) in zip(feed.load(1, feed.order(1)[60:]), whole[60:], strict=True):
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(ours[:4], theirs[:4]))
        assert_close(ours.source, torch.from_numpy(rows)[ours.labels])
        assert bool((ours.target > 50).all()) and len(paths) == 8


# graph and unseen classes

def test_shipped_graphs_mark_their_unseen_classes() -> None:
    for name, classes, unseen in (("awa2", 50, 10), ("toy", 60, 12)):
        graph, indices = sre_data.graph_and_unseen(Config(method="sre-clip", graph=name))
        assert (graph.classes, len(indices)) == (classes, unseen) and "WordNet" in graph.notice
    assert [graph.names[k].replace(" ", "_") for k in indices] == sorted(SPLIT["test"])
    assert [name.replace(" ", "_") for name in graph.names[:60]] == list(CLASSES)


def test_shipped_toy_graph_is_what_wordnet_gives() -> None:
    folder = Path("/usr/share/wordnet")
    if not (folder / "data.noun").is_file():
        pytest.skip("WordNet 3.0 (Debian: wordnet-base) is not installed")
    shipped = sre_data.SHIPPED / "toy.json"
    assert load_graph(shipped) == build_graph(WordNet(folder), read_classes(sre_data.SHIPPED / "toy.txt"))


def test_unseen_file_of_names_or_of_a_whole_class_list(graph_file: str, tmp_path: Path) -> None:
    unseen = tmp_path / "unseen.txt"
    config = Config(method="sre-clip", graph=graph_file, unseen=str(unseen))
    for text in ("Cow\n", "unseen n00000003 cow\n",
                 "seen n00000001 Killer_Whale\nseen n00000002 t-shirt\nunseen n00000003 cow\n"):
        unseen.write_text(text)
        assert sre_data.graph_and_unseen(config) == (GRAPH, [2])
    for text, parts in (("seen n00000002 t-shirt\nseen n00000001 killer whale\nunseen n00000003 cow\n",
                         ("in their order", "build the graph")),
                        ("seen n00000001 killer_whale\nunseen n00000003 cow\n", ("2 classes", "the 3 of")),
                        ("seen n00000001 killer_whale\nseen n00000002 t-shirt\nseen n00000003 cow\n", ("0 of 3 classes",)),
                        ("seen n00000003 cow\nunseen n00000009\n", ("n00000009",)),
                        ("lion\ntiger\n", ("lion, tiger",)), ("cow\nt-shirt\nkiller whale\n", ("3 of 3 classes",))):
        unseen.write_text(text)
        with pytest.raises(ValueError) as error:
            sre_data.graph_and_unseen(config)
        assert all(part in str(error.value) for part in parts), error.value
    with pytest.raises(ValueError, match="no class graph.*awa2, toy"):
        sre_data.graph_and_unseen(Config(method="sre-clip"))
    with pytest.raises(ValueError, match="no class is unseen: give --unseen"):
        sre_data.graph_and_unseen(Config(method="sre-clip", graph=graph_file))


# folders

def test_folder_names_match_classes(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "data", "Killer+Whale/1.png", "T_shirt/1.png", "n00000003/sub/2.png", "n00000003/1.png")
    folder = sre_data.scan_folder("--target", root, GRAPH)
    assert [(Path(path).name, name) for path, name in zip(folder.files.paths, folder.files.classes)] == [
        ("1.png", "killer whale"), ("1.png", "t-shirt"), ("1.png", "cow"), ("2.png", "cow")]


def test_mistakes_in_folders(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "odd", "cow/1.png", "ox/1.png", "animal/1.png")
    with pytest.raises(ValueError, match="--target .*odd: folders that are none of the graph's 3 classes: animal, ox;"):
        sre_data.scan_folder("--target", root, GRAPH)
    stray = image_folder(tmp_path / "stray", "1.png", "cow/1.png")
    with pytest.raises(ValueError, match="1.png lies in no class folder"):
        sre_data.scan_folder("--source", stray, GRAPH)
    with pytest.raises(FileNotFoundError, match="--source .*absent: no such folder"):
        sre_data.scan_folder("--source", str(tmp_path / "absent"), GRAPH)
    good = image_folder(tmp_path / "good", "cow/1.png", "t-shirt/1.png")
    with pytest.raises(ValueError, match="no folder bears the name of a seen class; there are cow, t-shirt"):
        sre_data.scan_sources(Config(source=(good,), target=good), GRAPH, [1, 2])
    for config in (Config(source=(good,)), Config(target=good)):
        with pytest.raises(ValueError, match="give --source DIR .* and --target DIR"):
            sre_data.scan_sources(config, GRAPH, [0])
    with pytest.raises(ValueError, match="draws its own"):
        sre_data.drawn(Config(dataset="toy", source=(good,)))


def test_drawn_folders(tmp_path: Path) -> None:
    config = sre_data.drawn(resolve(dict(method="sre-clip", data_root=str(tmp_path / "toy"), toy_images=1)))
    graph, unseen = sre_data.graph_and_unseen(config)
    source, target = sre_data.scan_sources(config, graph, unseen), sre_data.scan_folder("--target", config.target, graph)
    assert len(source) == 1 and len(source[0].files) == 48 and len(target.files) == 60
    assert target.files.domains[0] == "sketch" and Path(config.source[0]).name == "real" and config.stroke_domains == ()


# features

def test_features_are_computed_once_and_strokes_inverted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [image_folder(tmp_path / name, "cow/1.png", "cow/2.png", "t-shirt/3.png") for name in ("photo", "sketch")]
    scanned = [sre_data.scan_folder("--source", root, GRAPH) for root in folders]
    clip = CLIP.from_state_dict(tiny_state_dict())
    for name in "ab":
        (tmp_path / f"{name}.pt").write_bytes(name.encode())
    calls: list[int] = []
    original = clip.encode_image

    def counting(images: Tensor) -> Tensor:
        calls.append(len(images))
        return original(images)

    monkeypatch.setattr(clip, "encode_image", counting)

    def compute(weights: str = "a") -> Features:
        config = Config(workers=0, eval_batch=2, weights=str(tmp_path / f"{weights}.pt"))  # its digest is in the key
        return sre_data.features(scanned, clip, config, tmp_path / "cache", torch.device("cpu"))

    found = compute()
    images = [open_image(path) for path in found.paths]
    images[3:] = [ImageOps.invert(image) for image in images[3:]]
    expected = original(torch.stack([preprocess(32)(image) for image in images]))
    assert_close(found.take(torch.arange(6)), expected, rtol=1e-5, atol=1e-5)
    assert found.labels.tolist() == [2, 2, 1] * 2 and all(isinstance(part, np.memmap) for part in found.parts)
    assert sum(calls) == 6
    assert_close(compute().take(torch.arange(6)), found.take(torch.arange(6)), rtol=0, atol=0)
    assert sum(calls) == 6
    compute("b")
    assert sum(calls) == 12
    shutil.copy(found.paths[0], Path(folders[0]) / "cow" / "4.png")
    scanned[0] = sre_data.scan_folder("--source", folders[0], GRAPH)
    assert len(compute()) == 7 and sum(calls) == 13  # the new image alone is encoded


def test_unreadable_images_stop_or_are_left_out(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "photo", "cow/1.png", "t-shirt/3.png")
    (tmp_path / "photo" / "cow" / "0.png").write_bytes(b"no image")
    clip = CLIP.from_state_dict(tiny_state_dict())

    def compute(bad: str, only: set[int] | None = None) -> Features:
        config = Config(workers=0, bad_images=bad)
        return sre_data.features([sre_data.scan_folder("--target", root, GRAPH, only=only)], clip, config, tmp_path / "cache",
                                 torch.device("cpu"))

    with pytest.raises(ValueError, match="1 of 3 images could not be read.*--bad-images skip"):
        compute("error")
    found = compute("skip")
    assert [Path(path).name for path in found.paths] == ["1.png", "3.png"] and found.labels.tolist() == [2, 1]
    assert compute("error", only={1}).labels.tolist() == [1]  # a folder that is not used is not read


def test_presets_know_their_method_and_dataset() -> None:
    sre = resolve(dict(method="sre-clip"))
    assert (sre.dataset, sre.graph, sre.weights) == ("toy", "toy", "weights/demo-clip.pt")
    assert resolve(dict(method="sre-clip"), fast=True).sre_iterations < sre.sre_iterations
    given = resolve(dict(method="sre-clip", source=["a"], target="b"))
    assert (given.dataset, given.graph, given.source, given.sre_iterations) == ("folder", "", ("a",), 3000)
    assert resolve(dict(source=["a"]), "i2awa").graph == "awa2" and resolve({}, "i2webv").sre_kappa == 0.82
    assert resolve(dict(variant="released"), "i2awa").sre_report == "best-test"
    assert resolve({}, fast=True).toy_images < resolve({}).toy_images
    with pytest.raises(ValueError, match="--preset i2awa is for --method sre-clip, not ucdr-adapter"):
        resolve(dict(method="ucdr-adapter"), "i2awa")
    with pytest.raises(ValueError, match="--preset tuberlin is for --method ucdr-adapter, not sre-clip"):
        resolve(dict(method="sre-clip"), "tuberlin")


# evaluation

@pytest.mark.parametrize("iterations,expected", [
    (3000, list(range(300, 2701, 300))), (1000, list(range(100, 901, 100))), (500, [100, 200, 300, 400]), (130, [100]),
    (70, [70])])
def test_the_released_evaluations_are_at_tenths_and_never_at_the_end(iterations: int, expected: list[int]) -> None:
    rows = np.zeros((4, 3), dtype=np.float32)
    part = Features([rows], list("abcd"), torch.arange(4))
    feed = sre_data.feed(part, part, small_batches(2)(sre_iterations=iterations), torch.device("cpu"))
    assert [min(100 * epochs, iterations) for epochs in range(1, feed.epochs + 1) if feed.validates(epochs)] == expected  # S6


def small_sre(c: int, unseen: list[int], **options: object) -> SRECLIP:
    torch.manual_seed(0)
    config = small_batches(7)(sre_hidden=16, **options)
    vectors = torch.nn.functional.normalize(torch.randn(c, 6), dim=1)
    return SRECLIP(Width(8), [str(k) for k in range(c)], vectors, torch.eye(c), unseen, config)


def test_released_test_batches_hold_512_of_one_kind_in_class_order() -> None:
    generator = torch.Generator().manual_seed(1)
    labels, unseen = torch.randint(5, (2600,), generator=generator), [1, 3]
    batches = predictions.test_batches(labels, unseen, True, 256)
    loaders: list[list[int]] = []
    for wanted in (True, False):  # two loaders, class after class, each cut at 512
        order = [i for k in range(5) if (k in unseen) == wanted for i in range(2600) if labels[i] == k]
        loaders += [order[start:start + 512] for start in range(0, len(order), 512)]
    assert [batch.tolist() for batch in batches] == loaders  # S2
    assert [len(batch) for batch in predictions.test_batches(labels, unseen, False, 256)] == [256] * 10 + [40]

    method = small_sre(5, unseen, test_attention="batch").eval()
    x = torch.randn(2600, 8, generator=generator)
    target = Features([x.numpy()], [str(i) for i in range(2600)], labels)
    expected = torch.empty(2600, 5)
    for batch in loaders:
        expected[batch] = method.logits(x[batch])
    for rows, scores in predictions.method_scores(method, target, torch.device("cpu")):
        assert_close(scores, expected[rows])


@pytest.mark.parametrize("unseen", [[2], [0, 4, 6]])
def test_accuracies_chunk_by_chunk_are_those_of_all_logits(unseen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(7, (90,), generator=generator)
    x = torch.randn(90, 8, generator=generator)
    target, method = Features([x.numpy()], [""] * 90, labels), small_sre(7, unseen)
    anchors = torch.nn.functional.normalize(torch.randn(7, 8, generator=generator), dim=1)
    monkeypatch.setattr(predictions, "CHUNK", 11)
    whole = {"baseline": torch.nn.functional.normalize(x, dim=1) @ anchors.T, "method": method.eval().logits(x)}
    parts = {"baseline": predictions.scores_of(partial(predictions.baseline_logits, anchors), target),
             "method": predictions.method_scores(method, target, torch.device("cpu"))}
    for name, scores in whole.items():
        expected = zero_shot_accuracy(scores, labels, unseen)
        predicted = predictions.predict(parts[name], 90, 7, unseen)
        assert torch.equal(predicted.everywhere, scores.argmax(dim=1)), name
        assert predictions.accuracies(predicted, labels, unseen, 7) == expected, name
    anchors[unseen] = 0  # prototypes of source images know no unseen class
    scores = predictions.scores_of(partial(predictions.baseline_logits, anchors), target)
    predicted = predictions.predict(scores, 90, 7, unseen)
    found = predictions.accuracies(predicted, labels, unseen, 7)
    assert found["instance"]["zsl"] is None and found["class"]["unseen"] == 0
    assert not set(predicted.everywhere.tolist()) & set(unseen)
