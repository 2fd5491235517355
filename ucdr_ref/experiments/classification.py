"""Domain-adaptive zero-shot classification: SRE-CLIP beside zero-shot CLIP, from image folders to a table."""
from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cli import as_value_error, digest_of, load_state
from ..clip.model import CLIP
from ..clip.weights import OPENAI_SHA256, file_digest
from ..clip.zero_shot import ZeroShot, class_text_features
from ..config import Config
from ..data.class_folders import ClassFolder, scan_class_folder
from ..data.features import Extractor, load_index
from ..data.folders import abbreviate
from ..distributed import derive_seed, one_process
from ..metrics import predicted_accuracy
from ..sre.adapter import EPOCH, SRECLIP, Batch, check_unseen
from ..sre.graph import (
    Graph,
    canonical,
    duplicates,
    load_graph,
    node_vectors,
    normalized_adjacency,
    parse_graph,
)
from ..sre.wordnet import read_classes
from ..training import PhaseData, load_own_state

SHIPPED = Path(__file__).parent.parent / "sre" / "graphs"
CHUNK = 4096  # images whose scores are held at once
TEST_BATCH = 512  # the released code's batch of test images, which attend to each other (S2)
COLUMNS = {"zsl": "ZSL", "unseen": "unseen", "seen": "seen", "h": "H"}
PROTOTYPES = "prototypes"  # the baseline of weights without a text tower
PUBLISHED = {"awa2": "published (I2AwA, instance): unseen 69.7, seen 88.0, H 77.7, an ablation\n"
                     "line in the released code"}


@dataclass(frozen=True)
class Data:
    """The class graph, which of its classes are unseen, and the folders of images."""

    graph: Graph
    unseen: list[int]
    sources: list[ClassFolder]
    target: ClassFolder

    def digests(self) -> dict[str, tuple[int, str]]:
        """Length and digest of every list of images, and of what the method takes from the graph."""
        graph = self.graph
        content = [graph.ids, graph.names, graph.edges, graph.classes, self.unseen]
        folders = {**{f"source {i}": folder for i, folder in enumerate(self.sources)}, "target": self.target}
        return {"graph": (len(graph.ids), digest_of(content)),
                **{name: (len(folder.files), folder.files.digest(os.path.realpath(folder.root)))
                   for name, folder in folders.items()}}


class Features(NamedTuple):
    """Frozen CLIP features of the images of one or more folders, not normalised."""

    rows: Tensor  # [n, e], on the CPU
    paths: list[str]
    labels: Tensor  # [n], class indices


def load_data(config: Config) -> tuple[Config, Data]:
    """Graph and folders; drawn data is drawn first where it is absent."""
    one_process("sre-clip")
    if config.dataset == "toy":
        config = draw_data(config)
    graph, unseen = read_graph(config)
    if not (config.source and config.target):
        raise ValueError("sre-clip needs labelled and unlabelled images: give --source DIR and --target DIR")
    if os.path.realpath(config.target) in map(os.path.realpath, config.source):
        raise ValueError(f"--target {config.target} is a --source too, whose labels would be trained on")
    seen = set(range(graph.classes)) - set(unseen)
    sources = [scan_folder("--source", root, graph, seen) for root in config.source]
    return config, Data(graph, unseen, sources, scan_folder("--target", config.target, graph))


def test_data(config: Config, state: dict[str, Any]) -> Data:
    """What a run is evaluated on: the graph it was trained with, and the target images."""
    one_process("sre-clip")
    graph = parse_graph(state["graph"])
    return Data(graph, state["unseen_ids"], [], scan_folder("--target", config.target, graph))


def scan_folder(flag: str, root: str, graph: Graph, only: set[int] | None = None) -> ClassFolder:
    return scan_class_folder(flag, root, graph.names[:graph.classes], graph.ids[:graph.classes], only)


def draw_data(config: Config) -> Config:
    """The demonstration: photographs of the seen classes as source, sketches of all classes as target."""
    from ..demo.drawing import CLASSES, SPLIT, write_dataset

    if config.source or config.target:
        raise ValueError("--dataset toy draws its own images; leave --source and --target out, or give "
                         "--dataset folder")
    source, target = Path(config.data_root, "source"), Path(config.data_root, "target")
    seen = [name for name in CLASSES if name not in SPLIT["test"]]
    write_dataset(source, seen, ["real"], config.toy_images)
    write_dataset(target, CLASSES, ["sketch"], config.toy_images)
    return replace(config, source=(str(source / "real"),), target=str(target / "sketch"))


def read_graph(config: Config) -> tuple[Graph, list[int]]:
    """The class graph, and the indices of its unseen classes.

    `--graph` names a shipped graph, which brings its list, or a file. `--unseen` is a file of names or ids,
    or a whole class list with lines `seen|unseen nXXXXXXXX name`. Raises FileNotFoundError or ValueError,
    also when no class is unseen.
    """
    graph_file, unseen_file = config.graph, config.unseen
    shipped = sorted(path.stem for path in SHIPPED.glob("*.json"))
    if graph_file in shipped:
        unseen_file = unseen_file or str(SHIPPED / f"{graph_file}.txt")
        graph_file = str(SHIPPED / f"{graph_file}.json")
    if not graph_file or not unseen_file:
        raise ValueError("which classes, and which of them are unseen? give --graph FILE (python -m "
                         "ucdr_ref.sre.wordnet builds one) and --unseen FILE, a name a line, or --graph "
                         + " or ".join(shipped))
    graph, lines = load_graph(graph_file), read_classes(unseen_file)
    names = [canonical(name) for name in graph.names[:graph.classes]]
    index = {name: k for k, name in enumerate(names) if names.count(name) == 1}
    index |= {synset: k for k, synset in enumerate(graph.ids[:graph.classes])}
    keys = {line.id or canonical(line.name): line.split for line in lines}
    if missing := [key for key in keys if key not in index]:
        raise ValueError(f"{unseen_file}: not the name of one of the graph's {graph.classes} classes: "
                         f"{abbreviate(missing)}; where several have it, give an id, `nXXXXXXXX name`")
    whole = "seen" in keys.values()
    unseen = sorted(index[key] for key, split in keys.items() if split == "unseen" or not whole)
    check_unseen(torch.tensor(unseen, dtype=torch.long), graph.names[:graph.classes])
    return graph, unseen


def describe(config: Config, data: Data, method: SRECLIP) -> list[str]:
    """Counts of nodes, classes, images and steps, and what is left out, a line each."""
    graph = data.graph
    lines = [f"graph    {graph.classes} classes ({len(data.unseen)} unseen), {len(graph.ids)} nodes, "
             f"{len(graph.edges)} edges"]
    for part, folder in [*(("source", folder) for folder in data.sources), ("target", data.target)]:
        classes = len(set(folder.labels))
        lines.append(f"{part}   {len(folder.files)} images, {classes} classes ({folder.root})")
        if folder.skipped:
            lines.append(f"note     {len(folder.skipped)} folders of other than seen classes are not used: "
                         f"{abbreviate(folder.skipped, 100)}")
    known = {*data.unseen, *(label for folder in data.sources for label in folder.labels)}
    if bare := [name for k, name in enumerate(graph.names[:graph.classes]) if k not in known]:
        lines.append(f"note     seen classes without a source image: {abbreviate(bare)}")
    count = sum(parameter.numel() for parameter in method.trainable("sre").values())
    return [*lines, f"phase sre: {config.sre_iterations} steps of {config.sre_batch} source and target "
                    f"images; {count:,} trainable parameters"]


def build_method(config: Config, clip: CLIP, graph: Graph, unseen: list[int], vectors: Tensor) -> SRECLIP:
    adjacency = normalized_adjacency(graph.edges, len(graph.ids))
    return SRECLIP(clip, graph.names[:graph.classes], vectors, adjacency, unseen, config)


def new_method(config: Config, clip: CLIP, data: Data) -> SRECLIP:
    """The method before training, drawn from torch's global generator."""
    vectors = node_vectors(data.graph, clip, config.class_vectors)
    return build_method(config, clip, data.graph, data.unseen, vectors)


def restore_method(config: Config, clip: CLIP, state: dict[str, Any], path: Path) -> SRECLIP:
    """The method of a checkpoint, ready to encode."""
    with as_value_error(path, "is no checkpoint of SRE-CLIP", "train again"):
        graph, vectors = parse_graph(state["graph"]), state["method"]["class_vectors"]
        method = build_method(config, clip, graph, state["unseen_ids"], vectors)
    load_own_state(method, state["method"], path)
    return method.to(next(clip.parameters()).device).eval()


def load_features(folders: Sequence[ClassFolder], clip: CLIP, config: Config, cache: Path) -> Features:
    """Features of the folders' images by the frozen tower, in memory; `cache` keeps them for all runs.

    Raises ValueError for an unreadable image.
    """
    device = next(clip.parameters()).device
    extractor = Extractor(ZeroShot(clip, normalized=False), device, config.precision, config.workers,
                          config.stroke_domains)
    key = digest_of(["image features", file_digest(config.weights)])
    rows, paths, labels = list[Tensor](), list[str](), list[int]()
    for folder in folders:
        index = load_index(folder.root, extractor, key, cache, without=folder.skipped)
        if index.unreadable:
            raise ValueError(f"{index.unreadable[0]}; replace or remove it")
        label = dict(zip(folder.files.paths, folder.labels))
        used = [i for i in range(len(index.paths)) if index.path(i) in label]
        rows.append(index.features[used])
        paths += map(index.path, used)
        labels += [label[index.path(i)] for i in used]
    return Features(torch.cat(rows), paths, torch.tensor(labels))


def training(config: Config, data: Data, method: SRECLIP, folder: Path,
             cache: Path) -> tuple[dict[str, PhaseData], Callable[[], float] | None, dict[str, Any]]:
    """Batches, the score of the evaluations on test images (S6), and what goes into the checkpoints."""
    source, target = (load_features(folders, method.clip, config, cache)
                      for folders in (data.sources, [data.target]))
    name, anchors = baseline(method.clip, data.graph, source)
    learned: dict[str, Any] = {
        "class_names": method.class_names, "graph": asdict(data.graph), "unseen_ids": data.unseen,
        "baseline": name, "anchors": anchors, "evaluations": []}
    if (folder / "last.pt").exists():
        learned["evaluations"] = load_state(folder / "last.pt")["evaluations"]

    def validate() -> float:
        """H (instance) on the test images, as the released code chooses by (S6)."""
        found = accuracies(predict(method, target), target.labels, data.unseen, data.graph.classes)
        learned["evaluations"].append(found)
        return found["instance"]["h"] or 0.0

    phases = {"sre": phase_data(source, target, config, method.unseen_ids.device)}
    return phases, validate if config.sre_report == "best-test" else None, learned


@lru_cache(maxsize=8)
def shuffled(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def draw_batch(n: int, b: int, iteration: int, *seed: object) -> Tensor:
    """Indices [min(b, n)] of an iteration, a function of it and the seed: whole batches of shuffled passes.

    What a pass over the n images leaves over is another part of them in every pass.
    """
    b = min(b, n)
    turn, batch = divmod(iteration, n // b)
    return shuffled(n, derive_seed(*seed, turn))[batch * b:(batch + 1) * b]


def phase_data(source: Features, target: Features, config: Config, device: torch.device) -> PhaseData:
    """Source features with labels and target features, whose labels are never read, for every iteration."""
    iterations, b = config.sre_iterations, config.sre_batch

    def order(epoch: int) -> range:
        return range(epoch * EPOCH, min((epoch + 1) * EPOCH, iterations))

    def load(epoch: int, left: Sequence[int]) -> Iterator[tuple[Batch, list[str]]]:
        for i in left:
            s = draw_batch(len(source.paths), b, i, config.seed, "source")
            t = draw_batch(len(target.paths), b, i, config.seed, "target")
            features, labels, unlabelled = source.rows[s], source.labels[s], target.rows[t]
            files = [source.paths[k] for k in s.tolist()] + [target.paths[k] for k in t.tolist()]
            yield Batch(features.to(device), labels.to(device), unlabelled.to(device), i), files

    def validates(epochs: int) -> bool:
        """S6: as released, where a multiple of a tenth of the iterations is passed, but not at the end
        (3,000: after 300, 600, ... 2,700); only a run of one epoch is evaluated there.
        """
        done = epochs * EPOCH
        passed = 10 * done // iterations > 10 * (done - EPOCH) // iterations
        return passed and (done < iterations or epochs == 1)

    size = min(b, len(source.paths)) + min(b, len(target.paths))
    return PhaseData(math.ceil(iterations / EPOCH), order, load, validates=validates, batch_size=size)


# Evaluation


def baseline(clip: CLIP, graph: Graph, source: Features) -> tuple[str, Tensor]:
    """Name and class anchors [c, e] of CLIP without training: text features of "a photo of a {name}".

    Weights without a text tower: the mean direction of each class's source images, zero where it has none.
    """
    if clip.has_text:
        return "zero-shot", class_text_features(clip, graph.names[:graph.classes]).cpu()
    sums = torch.zeros(graph.classes, source.rows.shape[1])
    sums.index_add_(0, source.labels, F.normalize(source.rows, dim=1))
    return PROTOTYPES, F.normalize(sums, dim=1)


def best_classes(scores: Tensor, unseen: Sequence[int]) -> Tensor:
    """scores [b, c] -> the best class among all and among the unseen ones [b, 2], on the CPU"""
    ids = torch.tensor(unseen, device=scores.device)
    return torch.stack([scores.argmax(dim=1), ids[scores[:, ids].argmax(dim=1)]], dim=1).cpu()


def predict_baseline(anchors: Tensor, target: Features, unseen: Sequence[int]) -> Tensor:
    """`best_classes` [n, 2] by cosines with the anchors; a class without an anchor is never predicted."""
    parts = (F.normalize(rows, dim=1) @ anchors.T for rows in target.rows.split(CHUNK))
    without = ~anchors.any(dim=1)
    return torch.cat([best_classes(scores.masked_fill(without, -torch.inf), unseen) for scores in parts])


def test_batches(labels: Tensor, unseen: Sequence[int], released: bool, size: int) -> Sequence[Tensor]:
    """Which rows pass at once.

    Released (S2): images of unseen and of seen classes apart, class by class, 512 at once; else `size` in the
    order of the rows, which makes no difference to an image that attends to itself.
    """
    if not released:
        return torch.arange(len(labels)).split(size)
    by_class = labels.argsort(stable=True)
    of_unseen = torch.isin(labels[by_class], torch.tensor(unseen))
    parts = by_class[of_unseen].split(TEST_BATCH) + by_class[~of_unseen].split(TEST_BATCH)
    return [part for part in parts if len(part)]


@torch.no_grad()
def predict(method: SRECLIP, target: Features) -> Tensor:
    """`best_classes` [n, 2] by the method's test-time logits."""
    training, options, unseen = method.training, method.options, method.unseen_ids.tolist()
    method.eval()
    classes, predicted = method.class_embeddings().T, torch.empty(len(target.labels), 2, dtype=torch.long)
    released = options.test_attention == "batch"  # S2
    for rows in test_batches(target.labels, unseen, released, options.sre_batch):
        scores = method.encode_features(target.rows[rows].to(classes.device)) @ classes
        predicted[rows] = best_classes(scores, unseen)
    method.train(training)
    return predicted


def accuracies(predicted: Tensor, labels: Tensor, unseen: Sequence[int],
               c: int) -> dict[str, dict[str, float | None]]:
    """`metrics.predicted_accuracy` of predictions [n, 2] for labels [n]; None where there are no images."""
    is_unseen = torch.isin(torch.arange(c), torch.tensor(unseen))
    found = predicted_accuracy(predicted[:, 0], predicted[:, 1], labels, is_unseen)
    return {average: {name: None if math.isnan(value) else value for name, value in values.items()}
            for average, values in found.items()}


def evaluate(config: Config, data: Data, method: SRECLIP, state: dict[str, Any], folder: Path,
             cache: Path) -> list[dict[str, Any]]:
    """Rows of baseline and method: accuracies in 0..1 under `instance` and `class`, `details` for files."""
    graph, unseen, names = data.graph, data.unseen, data.graph.names[:data.graph.classes]
    twice = set(duplicates(names))  # WebVision has two cranes
    names = [f"{name} ({synset})" if name in twice else name for name, synset in zip(names, graph.ids)]
    target = load_features([data.target], method.clip, config, cache)
    about = {"images": len(target.paths), "classes": len(target.labels.unique())}
    rows: list[dict[str, Any]] = []
    for name, predicted in ((state["baseline"], predict_baseline(state["anchors"], target, unseen)),
                            ("sre-clip", predict(method, target))):
        found = accuracies(predicted, target.labels, unseen, len(names))
        if name == PROTOTYPES:  # which know no unseen class
            found["instance"]["zsl"] = found["class"]["zsl"] = None
        rows.append({"method": name, **about, **found, "details": {
            "predicted": predicted, "labels": target.labels, "names": names, "unseen": unseen,
            "paths": target.paths}})
    if config.sre_report == "best-test":  # S6: each metric's own maximum over the test evaluations
        tried = load_state(folder / "last.pt")["evaluations"]
        best = {average: {name: max((found[average][name] or 0 for found in tried), default=None)
                          for name in COLUMNS} for average in ("instance", "class")}
        rows.append({"method": "best-test", **about, "evaluations": len(tried), **best})
    return rows


def table(rows: Sequence[dict[str, Any]], config: Config) -> list[str]:
    """The rows as lines of at most 80 columns, in %."""
    lines = [f"{rows[0]['images']} target images of {rows[0]['classes']} classes",
             f"{'in %':<14}{'mean over':<10}" + "".join(f"{title:>9}" for title in COLUMNS.values())]
    for row in rows:
        for average, things in (("instance", "images"), ("class", "classes")):
            found = [row[average][name] for name in COLUMNS]
            values = "".join(f"{'-':>9}" if value is None else f"{100 * value:9.2f}" for value in found)
            lines.append(f"{row['method']:<14}{things:<10}{values}")
        if row["method"] == PROTOTYPES:
            lines.append("  (no text tower: nearest mean of source images, which knows no unseen class)")
        if "evaluations" in row:
            count = row["evaluations"]
            lines.append(f"  (each metric's maximum over {count} evaluations on the test images, S6)")
    # Published numbers stand beside the whole target alone, and OpenAI's weights.
    whole = config.graph in PUBLISHED and rows[0]["classes"] == 50
    if whole and file_digest(config.weights) in OPENAI_SHA256.values():
        lines.append(PUBLISHED[config.graph])
    return lines
