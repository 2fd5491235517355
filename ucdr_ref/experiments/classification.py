"""Domain-adaptive zero-shot classification: SRE-CLIP beside zero-shot CLIP, from image folders to a table."""
from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cli import as_value_error, digest_of, load_state
from ..clip.model import CLIP
from ..clip.weights import file_digest
from ..clip.zero_shot import ZeroShot, class_text_features
from ..config import Config
from ..data.class_folders import ClassFolder, Features, draw_batch, load_features, scan_class_folder
from ..data.features import Extractor
from ..data.folders import abbreviate
from ..distributed import one_process
from ..metrics import predicted_accuracy
from ..sre.adapter import EPOCH, SRECLIP, Batch, check_unseen, test_batches
from ..sre.graph import Graph, load_graph, node_vectors, normalized_adjacency, parse_graph
from ..sre.wordnet import unseen_classes
from ..training import PhaseData, load_own_state
from .report import ACCURACIES

SHIPPED = Path(__file__).parent.parent / "sre" / "graphs"
CHUNK = 4096  # images whose scores are held at once
PROTOTYPES = "prototypes"  # the baseline of weights without a text tower


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
        found = {"graph": (len(graph.ids), digest_of(content))}
        for i, folder in enumerate([self.target, *self.sources]):
            name = f"source {i}" if i else "target"
            found[name] = (len(folder.files), folder.files.digest(os.path.realpath(folder.root)))
        return found


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

    `--graph` names a shipped graph, which brings its list, or a file. Raises FileNotFoundError or
    ValueError, also when no class is unseen.
    """
    graph_file, unseen_file = config.graph, config.unseen
    if (SHIPPED / f"{graph_file}.json").exists():
        unseen_file = unseen_file or str(SHIPPED / f"{graph_file}.txt")
        graph_file = str(SHIPPED / f"{graph_file}.json")
    if not graph_file or not unseen_file:
        raise ValueError("which classes, and which of them are unseen? give --graph awa2, or --graph FILE "
                         "(python -m ucdr_ref.sre.wordnet builds one) and --unseen FILE, a name a line")
    graph = load_graph(graph_file)
    unseen = unseen_classes(graph, unseen_file)
    check_unseen(torch.tensor(unseen, dtype=torch.long), graph.names[:graph.classes])
    return graph, unseen


def describe(config: Config, data: Data, method: SRECLIP) -> list[str]:
    """Counts of nodes, classes, images and steps, and what is left out, a line each."""
    graph, known = data.graph, set(data.unseen)
    lines = [f"graph    {graph.classes} classes ({len(data.unseen)} unseen), {len(graph.ids)} nodes, "
             f"{len(graph.edges)} edges"]
    for part, folder in [*(("source", folder) for folder in data.sources), ("target", data.target)]:
        classes = set(folder.labels)
        lines.append(f"{part}   {len(folder.files)} images, {len(classes)} classes ({folder.root})")
        if part == "source":
            known |= classes
        if folder.skipped:
            lines.append(f"note     {len(folder.skipped)} folders of other than seen classes are not used: "
                         f"{abbreviate(folder.skipped, 100)}")
    if bare := [name for k, name in enumerate(graph.names[:graph.classes]) if k not in known]:
        lines.append(f"note     seen classes without a source image: {abbreviate(bare)}")
    count = sum(parameter.numel() for parameter in method.trainable("sre").values())
    return [*lines, f"phase sre: {config.sre_iterations} steps of {config.sre_batch} source and target "
                    f"images; {count:,} trainable parameters"]


def build_method(config: Config, clip: CLIP, graph: Graph, unseen: list[int],
                 vectors: Tensor | None = None) -> SRECLIP:
    """The method before training, drawn from torch's global generator; vectors [N, w] of the nodes."""
    vectors = node_vectors(graph, clip, config.class_vectors) if vectors is None else vectors
    adjacency = normalized_adjacency(graph.edges, len(graph.ids))
    method = SRECLIP(clip, graph.names[:graph.classes], vectors, adjacency, unseen, config)
    return method.to(next(clip.parameters()).device)


def restore_method(config: Config, clip: CLIP, state: dict[str, Any], path: Path) -> SRECLIP:
    """The method of a checkpoint, ready to encode."""
    with as_value_error(path, "is no checkpoint of SRE-CLIP", "train again"):
        graph, vectors = parse_graph(state["graph"]), state["method"]["class_vectors"]
        method = build_method(config, clip, graph, state["unseen_ids"], vectors)
    load_own_state(method, state["method"], path)
    return method.eval()


def features_of(folders: Sequence[ClassFolder], clip: CLIP, config: Config, cache: Path) -> Features:
    """Frozen CLIP's, not normalised; `cache` keeps them for all runs."""
    device = next(clip.parameters()).device
    extractor = Extractor(ZeroShot(clip, normalized=False), device, config.precision, config.workers,
                          config.stroke_domains)
    key = digest_of(["image features", file_digest(config.weights)])
    return load_features(folders, extractor, key, cache)


def training(config: Config, data: Data, method: SRECLIP, folder: Path,
             cache: Path) -> tuple[dict[str, PhaseData], Callable[[], float] | None, dict[str, Any]]:
    """Batches, the score of the evaluations on test images (S6), and what goes into the checkpoints."""
    source, target = (features_of(folders, method.clip, config, cache)
                      for folders in (data.sources, [data.target]))
    name, anchors = baseline(method.clip, data.graph, source)
    learned: dict[str, Any] = {
        "class_names": method.class_names, "graph": asdict(data.graph), "unseen_ids": data.unseen,
        "baseline": name, "anchors": anchors, "evaluations": []}
    if (folder / "last.pt").exists():
        learned["evaluations"] = load_state(folder / "last.pt")["evaluations"]

    def validate() -> float:
        """H (instance) on the test images, by which the released code chooses (S6)."""
        found = accuracies(predict(method, target), target.labels, data.unseen, data.graph.classes)
        learned["evaluations"].append(found)
        return found["instance"]["h"] or 0.0

    phases = {"sre": phase_data(source, target, config, method.unseen_ids.device)}
    return phases, validate if config.sre_report == "best-test" else None, learned


def phase_data(source: Features, target: Features, config: Config, device: torch.device) -> PhaseData:
    """Source features with labels and target features, whose labels are never read, for every iteration."""
    iterations, b = config.sre_iterations, config.sre_batch

    def order(epoch: int) -> range:
        return range(epoch * EPOCH, min((epoch + 1) * EPOCH, iterations))

    def load(epoch: int, left: Sequence[int]) -> Iterator[tuple[Batch, list[str]]]:
        for i in left:
            s, t = (draw_batch(len(part.paths), b, i, config.seed, name)
                    for part, name in ((source, "source"), (target, "target")))
            parts = [rows.to(device) for rows in (source.rows[s], source.labels[s], target.rows[t])]
            files = [source.paths[k] for k in s] + [target.paths[k] for k in t]
            yield Batch(parts[0], parts[1], parts[2], i), files

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


@torch.no_grad()
def predict(method: SRECLIP, target: Features) -> Tensor:
    """`best_classes` [n, 2] by the method's test-time cosines."""
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
    unseen, names = data.unseen, data.graph.names[:data.graph.classes]
    names = [f"{name} ({synset})" if names.count(name) > 1 else name  # WebVision has two cranes
             for name, synset in zip(names, data.graph.ids)]
    target = features_of([data.target], method.clip, config, cache)
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
                          for name in ACCURACIES} for average in ("instance", "class")}
        rows.append({"method": "best-test", **about, "evaluations": len(tried), **best})
    return rows
