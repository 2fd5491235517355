"""Domain-adaptive zero-shot classification: SRE-CLIP beside zero-shot CLIP, from image folders to a table."""
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cli import digest_of, load_state
from ..clip.model import CLIP
from ..clip.weights import file_digest
from ..clip.zero_shot import ZeroShot, class_text_features
from ..config import Config
from ..data.class_folders import ClassFolder, draw_batch, scan_class_folder
from ..data.features import load_index
from ..data.folders import abbreviate
from ..distributed import one_process
from ..metrics import zero_shot_accuracy
from ..sre.adapter import EPOCH, SRECLIP, Batch, test_batches
from ..sre.graph import Graph, load_graph, node_vectors, normalized_adjacency
from ..sre.wordnet import unseen_classes
from ..training import PhaseData
from .report import ACCURACIES

SHIPPED = Path(__file__).parent.parent / "sre" / "graphs"
Training = tuple[dict[str, PhaseData], Callable[[], float] | None, dict[str, Any]]


class Features(NamedTuple):
    rows: Tensor  # [n, e], on the CPU
    paths: list[str]
    labels: Tensor  # [n], class indices


@dataclass(frozen=True)
class Data:
    """The class graph, which of its classes are unseen, and the folders of images."""

    graph: Graph
    unseen: list[int]
    sources: list[ClassFolder]
    target: ClassFolder

    def classes(self) -> dict[str, Any]:
        """What of it stands in a checkpoint."""
        return {"graph": asdict(self.graph), "unseen_ids": self.unseen}

    def digests(self) -> dict[str, tuple[int, str]]:
        """Length and digest of the graph and of every list of images."""
        folders = {"target": self.target, **{f"source {i}": one for i, one in enumerate(self.sources, 1)}}
        return {"graph": (len(self.graph.ids), digest_of(self.classes())),
                **{name: (len(one.files), digest_of([path for path, *_ in one.files]))
                   for name, one in folders.items()}}


def load_data(config: Config) -> tuple[Config, Data]:
    """Graph and folders; the demonstration's, real and sketch, are drawn first where they are absent."""
    one_process("sre-clip")
    if config.dataset == "toy":
        from ..demo.drawing import CLASSES, write_dataset
        root = write_dataset(config.data_root, CLASSES, ["real", "sketch"], config.toy_images)
        config = replace(config, source=config.source or (str(root / "real"),),
                         target=config.target or str(root / "sketch"))
    if not (config.source and config.target):
        raise ValueError("sre-clip needs labelled and unlabelled images: give --source DIR and --target DIR")
    if os.path.realpath(config.target) in map(os.path.realpath, config.source):
        raise ValueError(f"--target {config.target} is a --source too, whose labels would be trained on")
    graph, unseen = read_graph(config)
    seen = set(range(graph.classes)) - set(unseen)
    sources = [scan_folder("--source", root, graph, seen) for root in config.source]
    return config, Data(graph, unseen, sources, scan_folder("--target", config.target, graph))


def test_data(config: Config, state: dict[str, Any]) -> Data:
    """What a run is evaluated on: the graph it was trained with, and the target images."""
    graph = Graph(**state["graph"])
    return Data(graph, state["unseen_ids"], [], scan_folder("--target", config.target, graph))


def scan_folder(flag: str, root: str, graph: Graph, only: set[int] | None = None) -> ClassFolder:
    return scan_class_folder(flag, root, graph.names[:graph.classes], graph.ids[:graph.classes], only)


def read_graph(config: Config) -> tuple[Graph, list[int]]:
    """The class graph, shipped or of a file, and the indices of its unseen classes."""
    graph_file, unseen_file = config.graph, config.unseen
    if (SHIPPED / f"{graph_file}.json").exists():
        unseen_file = unseen_file or str(SHIPPED / f"{graph_file}.txt")
        graph_file = str(SHIPPED / f"{graph_file}.json")
    if not graph_file or not unseen_file:
        raise ValueError("which classes, and which of them are unseen? give --graph awa2, or --graph FILE "
                         "(python -m ucdr_ref.sre.wordnet builds one) and --unseen FILE, a name a line")
    graph = load_graph(graph_file)
    return graph, unseen_classes(graph, unseen_file)


def describe(config: Config, data: Data, method: SRECLIP) -> list[str]:
    """Counts of nodes, classes, images and steps, and what is left out, a line each."""
    graph = data.graph
    lines = [f"graph    {graph.classes} classes ({len(data.unseen)} unseen), {len(graph.ids)} nodes, "
             f"{len(graph.edges)} edges"]
    for folder in [*data.sources, data.target]:
        part, classes = "target" if folder is data.target else "source", len(set(folder.labels))
        lines.append(f"{part}   {len(folder.files)} images, {classes} classes ({folder.root})")
        if folder.skipped:
            lines.append(f"note     not used, being of no seen class: {abbreviate(folder.skipped, 100)}")
    count = sum(parameter.numel() for parameter in method.trainable("sre").values())
    return [*lines, f"phase sre: {config.sre_iterations} steps of {config.sre_batch} source and target "
                    f"images; {count:,} trainable parameters"]


def build_method(config: Config, clip: CLIP, state: dict[str, Any]) -> SRECLIP:
    """A new method of `Data.classes`, drawn from torch's global generator; a checkpoint's, still to load."""
    graph = Graph(**state["graph"])
    vectors = (state["method"]["class_vectors"] if "method" in state
               else node_vectors(graph, clip, config.class_vectors))
    adjacency = normalized_adjacency(graph.edges, len(graph.ids))
    method = SRECLIP(clip, graph.names[:graph.classes], vectors, adjacency, state["unseen_ids"], config)
    return method.to(clip.visual.proj.device)


def features_of(folders: Sequence[ClassFolder], clip: CLIP, config: Config, cache: Path) -> Features:
    """Frozen CLIP's, not normalised; `cache` keeps them for all runs."""
    key = digest_of(["image features", file_digest(config.weights)])
    method = ZeroShot(clip, normalized=False)
    found = [load_index(folder.root, method, config, key, cache, files=folder.files) for folder in folders]
    return Features(torch.cat([index.features for index in found]),
                    [index.path(i) for index in found for i in range(len(index.paths))],
                    torch.tensor([label for folder in folders for label in folder.labels]))


def training(config: Config, data: Data, method: SRECLIP, folder: Path, cache: Path) -> Training:
    """Batches, the score of the evaluations on test images (S6), and what goes into the checkpoints."""
    source, target = (features_of(folders, method.clip, config, cache)
                      for folders in (data.sources, [data.target]))
    learned, last = {**data.classes(), "evaluations": list[Any]()}, folder / "last.pt"
    if last.exists():
        learned["evaluations"] = load_state(last).get("evaluations", [])  # another method's is refused later

    def validate() -> float:
        """H (instance) on the test images, by which the released code chooses (S6)."""
        method.eval()
        found, _ = accuracies(method.logits, target, method)
        method.train()
        learned["evaluations"].append(found)
        return found["instance"]["h"] or 0.0

    phases = {"sre": phase_data(source, target, config, method.unseen_ids.device)}
    return phases, validate if config.sre_report == "best-test" else None, learned


def phase_data(source: Features, target: Features, config: Config, device: torch.device) -> PhaseData:
    """Source features with labels and target features, whose labels are never read, for every iteration."""
    iterations, b = config.sre_iterations, config.sre_batch

    def order(epoch: int) -> range:
        return range(epoch * EPOCH, min((epoch + 1) * EPOCH, iterations))

    def load(epoch: int, left: Sequence[int]) -> Iterator[tuple[Batch, int]]:
        for i in left:
            s, t = (draw_batch(len(part.paths), b, i, config.seed, name)
                    for part, name in ((source, "source"), (target, "target")))
            rows, labels, unlabelled = source.rows[s], source.labels[s], target.rows[t]
            yield Batch(rows.to(device), labels.to(device), unlabelled.to(device), i), len(s) + len(t)

    def validates(epochs: int) -> bool:
        """S6: as released, after each tenth of the iterations but the last; a run of one epoch at its end."""
        done = epochs * EPOCH
        passed = 10 * done // iterations > 10 * (done - EPOCH) // iterations
        return passed and (done < iterations or epochs == 1)

    size = min(b, len(source.paths)) + min(b, len(target.paths))
    return PhaseData(math.ceil(iterations / EPOCH), order, load, validates=validates, batch_size=size)


# Evaluation


@torch.no_grad()
def accuracies(score: Callable[[Tensor], Tensor], target: Features,
               method: SRECLIP) -> tuple[dict[str, dict[str, float | None]], Tensor]:
    """`metrics.zero_shot_accuracy` of scores (features [b, e] -> [b, c]), and predictions [n, 2]: the best
    class among all and among the unseen ones.
    """
    unseen, labels = method.unseen_ids, target.labels
    released = method.options.test_attention == "batch"  # S2
    best = torch.empty(len(labels), 2, dtype=torch.long)
    for rows in test_batches(labels, unseen.tolist(), released, method.options.sre_batch):
        scores = score(target.rows[rows].to(unseen.device))
        of_unseen = unseen[scores[:, unseen].argmax(dim=1)]
        best[rows] = torch.stack([scores.argmax(dim=1), of_unseen], dim=1).cpu()
    return zero_shot_accuracy(best, labels, unseen), best


def evaluate(config: Config, data: Data, method: SRECLIP, folder: Path, cache: Path) -> list[dict[str, Any]]:
    """Rows of zero-shot CLIP and method: accuracies in 0..1 under `instance` and `class`, and `details`."""
    target = features_of([data.target], method.clip, config, cache)
    scores: dict[str, Callable[[Tensor], Tensor]] = {"sre-clip": method.logits}
    if method.clip.has_text:
        anchors = class_text_features(method.clip, method.class_names)
        scores = {"zero-shot": lambda rows: F.normalize(rows, dim=1) @ anchors.T, **scores}
    about = {"images": len(target.paths), "classes": len(target.labels.unique())}
    rows: list[dict[str, Any]] = []
    for name, score in scores.items():
        found, predicted = accuracies(score, target, method)
        details = {"predicted": predicted, "labels": target.labels, "names": method.class_names,
                   "unseen": data.unseen, "paths": target.paths}
        rows.append({"method": name, **about, **found, "details": details})
    if config.sre_report == "best-test":  # S6: each metric's own maximum over the test evaluations
        tried = load_state(folder / "last.pt").get("evaluations", [])
        best = {average: {name: max((found[average][name] or 0 for found in tried), default=None)
                          for name in ACCURACIES} for average in ("instance", "class")}
        rows.append({"method": "best-test", **about, "evaluations": len(tried), **best})
    return rows
