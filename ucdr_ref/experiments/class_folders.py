"""SRE-CLIP's data: class graph and unseen list, image folders -> cached features of the frozen tower -> batches.

Legend: `b` batch, `e` CLIP embedding, `n` images, `c` classes.
"""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..clip.model import CLIP
from ..clip.tensorfile import file_digest
from ..clip.zero_shot import ZeroShot
from ..config import Config
from ..images.batches import Files
from ..images.cache import build_index, list_images
from ..images.features import Extractor
from ..machine.processes import fold
from ..sre.adapter import EPOCH, Batch, unseen_indices
from ..sre.graph import Graph, canonical, duplicates, load_graph
from ..sre.wordnet import read_classes
from ..training.loop import Feed
from .report import plain
from .trees import Listing, with_gone

SHIPPED = Path(__file__).parent.parent / "sre" / "graphs"


@dataclass(frozen=True)
class Folder:
    """Images of `<root>/<class>/*`, sorted by path."""

    root: str
    files: Files  # classes are the graph's names; the one domain is the root's own name


@dataclass(frozen=True)
class Features:
    """Frozen CLIP features, not normalised, of one or more folders; each part [n, e] is memory-mapped."""

    parts: list[np.ndarray]
    paths: list[str]
    labels: Tensor  # [n], class indices
    skipped: int = 0  # unreadable images, left out
    mean: Tensor | None = None  # [e], of the normalised features: `take` removes it
    length: float = 1.0  # of the features that `take` gives then

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: Tensor) -> Tensor:
        """Rows [b, e], read from the files, for indices [b]; centred ones are as long as the features are on average."""
        rows = np.empty((len(indices), self.parts[0].shape[1]), dtype=np.float32)
        wanted, start = indices.numpy(), 0
        for part in self.parts:
            here = (wanted >= start) & (wanted < start + len(part))
            rows[here] = part[wanted[here] - start]
            start += len(part)
        features = torch.from_numpy(rows)
        if self.mean is None:
            return features
        return F.normalize(F.normalize(features, dim=1) - self.mean, dim=1) * self.length

    def centred(self) -> Features:
        """The same features less their mean, at their usual length: the method's rates mean what they meant."""
        total, length = torch.zeros(self.parts[0].shape[1], dtype=torch.float64), 0.0
        for indices in torch.arange(len(self)).split(4096):
            rows = self.take(indices).double()
            total += F.normalize(rows, dim=1).sum(dim=0)
            length += float(rows.norm(dim=1).sum())
        return replace(self, mean=(total / len(self)).float(), length=length / len(self))


def graph_and_unseen(config: Config) -> tuple[Graph, list[int]]:
    """The class graph, and the indices of its unseen classes.

    `--graph` names a shipped graph or a file. `--unseen` is a file of names, or a whole class list of lines `seen|unseen
    nXXXXXXXX name`, whose classes must then be the graph's first nodes; a shipped graph brings its list.
    Raises FileNotFoundError or ValueError in one sentence, also when no class is unseen.
    """
    shipped = sorted(path.stem for path in SHIPPED.glob("*.json"))
    if not config.graph:
        raise ValueError("no class graph; give --graph FILE (python -m ucdr_ref.sre.wordnet builds one) or one of "
                         f"{', '.join(shipped)}")
    known = config.graph in shipped
    unseen_file = config.unseen or (SHIPPED / f"{config.graph}.txt" if known else None)
    if unseen_file is None:
        raise ValueError("no class is unseen: give --unseen FILE, one class name a line")
    lines = read_classes(unseen_file)
    whole = any(line.split == "seen" for line in lines)
    names = [line.name for line in lines if line.split == "unseen" or not whole]
    path = SHIPPED / f"{config.graph}.json" if known else config.graph
    graph = load_graph(path, [line.name for line in lines] if whole else None)
    return graph, unseen_indices(graph.names[: graph.classes], names)


def graph_digest(graph: Graph, unseen: Sequence[int]) -> str:
    """sha256 of what the method takes from a graph, so that a run is not resumed with another one."""
    content = [graph.ids, graph.names, graph.edges, graph.classes, list(unseen)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def class_folders(graph: Graph) -> dict[str, str]:
    """{a folder's `folder_key`: class name}. A folder bears a class's name or WordNet id; a name of two classes is none."""
    names = graph.names[: graph.classes]
    keys = [folder_key(name) for name in names]
    twice = set(duplicates(keys))
    return {**{key: name for key, name in zip(keys, names) if key not in twice}, **dict(zip(graph.ids, names))}


def folder_key(name: str) -> str:
    """Case, spaces, `_`, `+` and `-` do not matter."""
    return canonical(name.replace("-", " "))


def scan_folder(flag: str, root: str, graph: Graph, before: Sequence[str] = ()) -> Folder:
    """Lists `<root>/<class>/*` without opening an image. before: names that `trees.with_gone` may add.

    Raises FileNotFoundError for a missing folder, ValueError for one without images, images outside a class folder, and
    folders that are no class of the graph, which it lists.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{flag} {root}: no such folder; expected <folder>/<class>/<image>")
    names = with_gone([name for name, *_ in list_images(os.path.realpath(root))], before)
    if stray := [name for name in names if os.path.dirname(name) == ""]:
        raise ValueError(f"{flag} {root}: {stray[0]} lies in no class folder; expected <folder>/<class>/<image>")
    folders, known = [name.split(os.sep)[0] for name in names], class_folders(graph)
    found = {name: known.get(folder_key(name)) for name in sorted(set(folders))}
    if unknown := [name for name, label in found.items() if label is None]:
        raise ValueError(f"{flag} {root}: folders that are none of the graph's {graph.classes} classes: "
                         f"{', '.join(unknown)}; rename or remove them, or build a graph with these classes")
    real = os.path.realpath(root)
    paths, domain = [os.path.join(real, name) for name in names], os.path.basename(real)
    return Folder(root, Files(paths, [str(found[name]) for name in folders], [domain] * len(paths)))


def scan_sources(config: Config, graph: Graph, unseen: Sequence[int], before: Listing | None = None) -> list[Folder]:
    """All `--source` folders; ValueError when there is none, or when unseen classes have labelled images."""
    if not config.source or not config.target:
        raise ValueError("SRE-CLIP needs labelled and unlabelled images: give --source DIR [DIR ...] and --target DIR")
    folders = [scan_folder("--source", root, graph, (before or {}).get(f"source {i}", ()))
               for i, root in enumerate(config.source)]
    hidden = {graph.names[k] for k in unseen}
    for folder in folders:
        if wrong := sorted(hidden & set(folder.files.classes)):
            raise ValueError(f"--source {folder.root} holds images of unseen classes: {', '.join(wrong)}; take them out of "
                             "the folder or of --unseen")
    return folders


def summary(sources: Sequence[Folder], targets: Sequence[Folder], graph: Graph, unseen: Sequence[int]) -> str:
    """Counts of nodes, classes and images, and the seen classes that no source image is labelled with."""
    lines = [f"graph    {graph.classes} classes ({len(unseen)} unseen), {len(graph.ids)} nodes, {len(graph.edges)} edges"]
    for part, folders in (("source", sources), ("target", targets)):
        lines += [f"{part}   {len(folder.files)} images, {len(set(folder.files.classes))} classes ({folder.root})"
                  for folder in folders]
    labelled = {name for folder in sources for name in folder.files.classes}
    bare = [name for k, name in enumerate(graph.names[: graph.classes]) if k not in unseen and name not in labelled]
    if bare:
        lines.append(f"note     seen classes without a source image: {', '.join(bare)}")
    return "\n".join(map(plain, lines))


def features(folders: Sequence[Folder], graph: Graph, clip: CLIP, config: Config, cache: Path,
             device: torch.device) -> Features:
    """Features of the folders' images by the frozen tower, from `cache` or computed now and put there.

    An entry is used only for the same files (names, sizes, times), weights and preprocessing. Raises ValueError for an
    unreadable image, unless --bad-images skip.
    """
    model = [file_digest(config.weights), config.heads, config.precision, sorted(config.stroke_domains)]
    if config.image_reading != "upright":  # D19; without it the key is that of earlier versions
        model.append(config.image_reading)
    key = hashlib.sha256(json.dumps(model).encode()).hexdigest()
    number = {name: k for k, name in enumerate(graph.names[: graph.classes])}
    encoder = Extractor(ZeroShot(clip, normalized=False), config, device)
    parts, paths, labels, skipped = [], [], [], 0
    for folder in folders:
        index = build_index(folder.root, encoder.of_paths(), key, cache, config.bad_images)
        label = dict(zip(folder.files.paths, folder.files.classes))
        found = [index.path(row) for row in range(len(index.paths))]
        parts.append(index.features)
        skipped += len(folder.files) - len(index.paths)
        paths += found
        labels += [number[label[path]] for path in found]
    found_features = Features(parts, paths, torch.tensor(labels), skipped)
    return found_features.centred() if config.sre_center else found_features


@lru_cache(maxsize=8)
def shuffled(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def draw(n: int, b: int, iteration: int, *seed: object) -> Tensor:
    """Indices [min(b, n)] of an iteration: whole batches of shuffled passes over n images, a function of seed and iteration.

    What a pass leaves over (less than a batch) is another part of the images in every pass.
    """
    b = min(b, n)
    turn, place = divmod(iteration, n // b)
    return shuffled(n, fold(*seed, turn))[place * b:(place + 1) * b]


def feed(source: Features, target: Features, config: Config, device: torch.device) -> Feed:
    """Source features with labels and target features, whose labels are never read, for every iteration."""
    def order(epoch: int) -> range:
        return range(epoch * EPOCH, min((epoch + 1) * EPOCH, config.sre_iterations))

    def batches(epoch: int, left: Sequence[int]) -> Iterator[tuple[Batch, list[str]]]:
        for i in left:
            s, t = (draw(len(part), config.sre_batch, i, config.seed, name)
                    for name, part in (("source", source), ("target", target)))
            yield (Batch(source.take(s).to(device), source.labels[s].to(device), target.take(t).to(device), i),
                   [source.paths[k] for k in s.tolist()] + [target.paths[k] for k in t.tolist()])

    epochs = -(-config.sre_iterations // EPOCH)
    return Feed(epochs, order, batches, validates=partial(evaluates, config.sre_iterations))


def evaluates(iterations: int, epochs: int) -> bool:
    """Whether the released code evaluates on the test images after this many epochs of the loop (S6): where a
    multiple of a tenth of the iterations is passed, but not at the end. A run of one epoch is evaluated there.

    3,000 iterations: after 300, 600, ... 2,700.
    """
    done = epochs * EPOCH
    passed = 10 * done // iterations > 10 * (done - EPOCH) // iterations
    return passed and (done < iterations or epochs == 1)


def drawn(config: Config) -> Config:
    """The demonstration's config. Draws its source, photographs of the seen classes, and target, sketches of all classes.

    Raises ValueError when other folders are given as well.
    """
    from ..demo.drawing import CLASSES, SPLIT, write_dataset

    if config.source or config.target:
        raise ValueError("--dataset toy draws its own images; leave --source and --target out, or give --dataset folder")
    root = Path(config.data_root)
    seen = [name for name in CLASSES if name not in SPLIT["test"]]
    write_dataset(root / "source", seen, ["real"], config.toy_images)
    write_dataset(root / "target", CLASSES, ["sketch"], config.toy_images)
    return replace(config, source=(str(root / "source" / "real"),), target=str(root / "target" / "sketch"))
