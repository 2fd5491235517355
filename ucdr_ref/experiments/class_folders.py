"""SRE-CLIP's data: class graph and unseen list, image folders -> features of the frozen tower -> batches.

Legend: `b` batch, `e` CLIP embedding, `n` images.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..clip.model import CLIP
from ..clip.weights import file_digest
from ..clip.zero_shot import ZeroShot
from ..config import Config
from ..images.batches import Files
from ..images.cache import build_index
from ..images.features import Extractor
from ..images.listing import list_images
from ..machine.files import digest_of
from ..machine.processes import fold
from ..sre.adapter import EPOCH, Batch, check_unseen
from ..sre.graph import Graph, canonical, duplicates, load_graph
from ..sre.wordnet import SYNSET_ID, ClassLine, read_classes
from ..training.loop import Feed
from .datasets import folder_key, some
from .report import plain
from .trees import Listing, with_gone

SHIPPED = Path(__file__).parent.parent / "sre" / "graphs"


@dataclass(frozen=True)
class Folder:
    """Images of `<root>/<class>/*`, sorted by path."""

    root: str
    files: Files  # classes are the graph's names; the one domain is the root's own name
    labels: list[int]  # class indices: two classes may have one name
    skipped: list[str] = field(default_factory=list)  # class folders of a source outside the seen classes


@dataclass(frozen=True)
class Features:
    """Frozen CLIP features, not normalised, of one or more folders: parts [n, e], mapped from their files."""

    parts: list[np.ndarray]
    paths: list[str]
    labels: Tensor  # [n], class indices
    skipped: int = 0  # unreadable images, left out

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: Tensor) -> Tensor:
        """Rows [b, e] of indices [b], read from the files."""
        rows, start = torch.empty(len(indices), self.parts[0].shape[1]), 0
        for part in self.parts:
            here = (indices >= start) & (indices < start + len(part))
            rows[here] = torch.from_numpy(part[(indices[here] - start).numpy()])
            start += len(part)
        return rows


def graph_and_unseen(config: Config) -> tuple[Graph, list[int]]:
    """The class graph, and the indices of its unseen classes.

    `--graph` names a shipped graph, which brings its list, or a file. `--unseen` is a file of names or ids,
    or a whole class list, `seen|unseen nXXXXXXXX name`, whose classes must be the graph's, in their order.
    Raises FileNotFoundError or ValueError in one sentence, also when no class is unseen.
    """
    shipped = sorted(path.stem for path in SHIPPED.glob("*.json"))
    graph_file, unseen_file = config.graph, config.unseen
    if graph_file in shipped:
        graph_file = str(SHIPPED / f"{config.graph}.json")
        unseen_file = unseen_file or str(SHIPPED / f"{config.graph}.txt")
    if not graph_file:
        raise ValueError("no class graph; give --graph FILE (python -m ucdr_ref.sre.wordnet builds one) or "
                         f"one of {', '.join(shipped)}")
    graph = load_graph(graph_file)
    if not unseen_file:
        raise ValueError("no class is unseen: give --unseen FILE, one class name a line")
    lines = read_classes(unseen_file)
    listed, whole = listed_classes(lines, graph, unseen_file), any(line.split == "seen" for line in lines)
    if whole and listed != list(range(graph.classes)):
        raise ValueError(f"{unseen_file}: its {len(lines)} classes are not the {graph.classes} of "
                         f"{config.graph}, in their order; build the graph from this very list")
    unseen = sorted({k for k, line in zip(listed, lines) if line.split == "unseen" or not whole})
    check_unseen(torch.tensor(unseen, dtype=torch.long), graph.names[:graph.classes])
    return graph, unseen


def class_places(graph: Graph, key: Callable[[str], str]) -> dict[str, int]:
    """{a WordNet id, or the `key` of a name: class index}; a name of two classes is none."""
    keys = [key(name) for name in graph.names[:graph.classes]]
    twice = set(duplicates(keys))
    by_name = {name: k for k, name in enumerate(keys) if name not in twice}
    return {**by_name, **{synset: k for k, synset in enumerate(graph.ids[:graph.classes])}}


def listed_classes(lines: Sequence[ClassLine], graph: Graph, origin: str) -> list[int]:
    """The class index of each line, by WordNet id where it gives one; ValueError names what is no class."""
    places = class_places(graph, canonical)
    listed = [line.id or canonical(line.name) for line in lines]
    missing = [name for name in listed if name not in places]
    if several := set(missing).intersection(map(canonical, graph.names[:graph.classes])):
        raise ValueError(f"{origin}: {some(sorted(several))} names several classes; give the id too, "
                         "`nXXXXXXXX name`")
    if missing:
        raise ValueError(f"{origin}: not among the graph's {graph.classes} classes: {some(missing)}")
    return [places[name] for name in listed]


def scan_folder(flag: str, root: str, graph: Graph, only: Collection[int] | None = None,
                before: Sequence[str] = ()) -> Folder:
    """Lists `<root>/<class>/*` (AwA2: `<root>/JPEGImages/<class>/*`) without opening an image.

    A folder bears a class's name or WordNet id or both (I2AwA: `antelope-n02419796`). only: class indices;
    other folders are left out. before: names that
    `trees.with_gone` may add. Raises FileNotFoundError for a missing folder, ValueError for one without
    images of wanted classes, images outside a class folder, and, without `only`, folders that are no class of
    the graph.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{flag} {root}: no such folder; expected <folder>/<class>/<image>")
    if os.path.isdir(inner := os.path.join(root, "JPEGImages")):
        root = inner
    real = os.path.realpath(root)
    names = with_gone([name for name, *_ in list_images(real)], before)
    if stray := [name for name in names if os.sep not in name]:
        raise ValueError(f"{flag} {root}: {stray[0]} lies in no class folder; expected "
                         "<folder>/<class>/<image>")
    places = class_places(graph, folder_key)
    wanted = range(graph.classes) if only is None else only
    folders = [name.split(os.sep)[0] for name in names]

    def class_at(folder: str) -> int:
        name, _, synset = folder.rpartition("-")
        both = (synset, folder_key(name)) if SYNSET_ID.fullmatch(synset) else ()
        return next((places[key] for key in (folder_key(folder), *both) if key in places), -1)

    class_of = {folder: class_at(folder) for folder in sorted(set(folders))}
    skipped = [folder for folder, k in class_of.items() if k not in wanted]
    if only is None and skipped:
        raise ValueError(f"{flag} {root}: folders that are none of the graph's {graph.classes} classes: "
                         f"{some(skipped)}; rename or remove them, or build a graph with these classes")
    if len(skipped) == len(class_of):
        raise ValueError(f"{flag} {root}: no folder bears the name of a seen class; there are "
                         f"{some(skipped)}")
    paths = [os.path.join(real, name) for name, folder in zip(names, folders) if class_of[folder] in wanted]
    labels = [class_of[folder] for folder in folders if class_of[folder] in wanted]
    domains = [os.path.basename(real)] * len(paths)
    return Folder(root, Files(paths, [graph.names[k] for k in labels], domains), labels, skipped)


def scan_sources(config: Config, graph: Graph, unseen: Sequence[int],
                 before: Listing | None = None) -> list[Folder]:
    """All `--source` folders, without class folders outside the seen classes; ValueError for no source."""
    if not config.source or not config.target:
        raise ValueError("SRE-CLIP needs labelled and unlabelled images: give --source DIR [DIR ...] and "
                         "--target DIR")
    seen = set(range(graph.classes)) - set(unseen)
    return [scan_folder("--source", root, graph, seen, (before or {}).get(f"source {i}", ()))
            for i, root in enumerate(config.source)]


def summary(sources: Sequence[Folder], targets: Sequence[Folder], graph: Graph, unseen: Sequence[int]) -> str:
    """Counts of nodes, classes and images, and the seen classes that no source image is labelled with."""
    lines = [f"graph    {graph.classes} classes ({len(unseen)} unseen), {len(graph.ids)} nodes, "
             f"{len(graph.edges)} edges"]
    lines += [f"{part}   {len(folder.files)} images, {len(set(folder.labels))} classes ({folder.root})"
              for part, folders in (("source", sources), ("target", targets)) for folder in folders]
    lines += [f"note     {folder.root}: {len(folder.skipped)} class folders outside the seen classes are not "
              f"used: {some(folder.skipped)}" for folder in sources if folder.skipped]
    known = {*unseen, *(label for folder in sources for label in folder.labels)}
    if bare := [name for k, name in enumerate(graph.names[:graph.classes]) if k not in known]:
        lines.append(f"note     seen classes without a source image: {some(bare)}")
    return "\n".join(map(plain, lines))


def features(folders: Sequence[Folder], clip: CLIP, config: Config, run: Path,
             device: torch.device) -> Features:
    """Features of the folders' images by the frozen tower, kept in the run folder.

    They are of the same files (names, sizes, times), weights and preprocessing. Raises ValueError for an
    unreadable image, unless --bad-images skip.
    """
    model = [file_digest(config.weights), config.heads, config.precision, sorted(config.stroke_domains)]
    if config.image_reading != "upright":  # D19; without it the key is that of earlier versions
        model.append(config.image_reading)
    encoder = Extractor(ZeroShot(clip, normalized=False), config, device)
    cache = run / "features"
    parts, paths, labels, skipped = [], [], [], 0
    for folder in folders:
        index = build_index(folder.root, encoder.of_paths(), digest_of(model), cache, config.bad_images,
                            without=folder.skipped)
        label = dict(zip(folder.files.paths, folder.labels))
        rows = [row for row in range(len(index.paths)) if index.path(row) in label]
        used = list(map(index.path, rows))
        parts.append(index.features if len(rows) == len(index.paths) else index.features[rows])
        paths += used
        labels += [label[path] for path in used]
        skipped += len(folder.files) - len(used)
    return Features(parts, paths, torch.tensor(labels), skipped)


@lru_cache(maxsize=8)
def shuffled(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def draw(n: int, b: int, iteration: int, *seed: object) -> Tensor:
    """Indices [min(b, n)] of an iteration, a function of it and the seed: whole batches of shuffled passes.

    What a pass over the n images leaves over is another part of them in every pass.
    """
    b = min(b, n)
    turn, place = divmod(iteration, n // b)
    return shuffled(n, fold(*seed, turn))[place * b:(place + 1) * b]


def feed(source: Features, target: Features, config: Config, device: torch.device) -> Feed:
    """Source features with labels and target features, whose labels are never read, for every iteration."""
    iterations = config.sre_iterations

    def order(epoch: int) -> range:
        return range(epoch * EPOCH, min((epoch + 1) * EPOCH, iterations))

    def batches(epoch: int, left: Sequence[int]) -> Iterator[tuple[Batch, list[str]]]:
        for i in left:
            s = draw(len(source), config.sre_batch, i, config.seed, "source")
            t = draw(len(target), config.sre_batch, i, config.seed, "target")
            files = [source.paths[k] for k in s.tolist()] + [target.paths[k] for k in t.tolist()]
            yield Batch(source.take(s).to(device), source.labels[s].to(device), target.take(t).to(device),
                        i), files

    def validates(epochs: int) -> bool:
        """S6: the released code evaluates on the test images where a multiple of a tenth of the iterations is
        passed, but not at the end (3,000: after 300, 600, ... 2,700); here a run of one epoch is, there.
        """
        done = epochs * EPOCH
        passed = 10 * done // iterations > 10 * (done - EPOCH) // iterations
        return passed and (done < iterations or epochs == 1)

    return Feed(-(-iterations // EPOCH), order, batches, validates=validates)


def drawn(config: Config) -> Config:
    """The demonstration's config. Draws its source, photographs of the seen classes, and target, sketches of
    all classes; ValueError when other folders are given as well.
    """
    from ..demo.drawing import CLASSES, SPLIT, write_dataset

    if config.source or config.target:
        raise ValueError("--dataset toy draws its own images; leave --source and --target out, or give "
                         "--dataset folder")
    root = Path(config.data_root)
    seen = [name for name in CLASSES if name not in SPLIT["test"]]
    write_dataset(root / "source", seen, ["real"], config.toy_images)
    write_dataset(root / "target", CLASSES, ["sketch"], config.toy_images)
    return replace(config, source=(str(root / "source" / "real"),), target=str(root / "target" / "sketch"))
