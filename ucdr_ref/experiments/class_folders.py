"""SRE-CLIP's data: class graph and unseen list, image folders -> cached features of the frozen tower ->
batches.

Legend: `b` batch, `e` CLIP embedding, `n` images, `c` classes.
"""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..clip.model import CLIP
from ..clip.tensorfile import file_digest, regular_file
from ..clip.zero_shot import ZeroShot
from ..config import Config
from ..images.batches import Files
from ..images.cache import build_index
from ..images.features import Extractor
from ..images.listing import list_images
from ..machine.processes import fold
from ..sre.adapter import EPOCH, Batch, check_unseen, unseen_indices
from ..sre.graph import Graph, canonical, duplicates, load_graph, require_classes
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
        """Rows [b, e], read from the files, for indices [b]; centred ones are as long as the features are on
        average.
        """
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
        """The same features less their mean, at their usual length: the method's rates mean what they
        meant.
        """
        total, length = torch.zeros(self.parts[0].shape[1], dtype=torch.float64), 0.0
        for indices in torch.arange(len(self)).split(4096):
            rows = self.take(indices).double()
            total += F.normalize(rows, dim=1).sum(dim=0)
            length += float(rows.norm(dim=1).sum())
        return replace(self, mean=(total / len(self)).float(), length=length / len(self))


def graph_and_unseen(config: Config) -> tuple[Graph, list[int]]:
    """The class graph, and the indices of its unseen classes.

    `--graph` names a shipped graph or a file. `--unseen` is a file of names or ids, or a whole class list of
    lines `seen|unseen nXXXXXXXX name`, whose classes must then be the graph's first nodes; a shipped graph
    brings its list. Raises FileNotFoundError or ValueError in one sentence, also when no class is unseen.
    """
    shipped = sorted(path.stem for path in SHIPPED.glob("*.json"))
    if not config.graph:
        raise ValueError("no class graph; give --graph FILE (python -m ucdr_ref.sre.wordnet builds one) or "
                         "one of "
                         f"{', '.join(shipped)}")
    known = config.graph in shipped
    unseen_file = config.unseen or (SHIPPED / f"{config.graph}.txt" if known else None)
    if unseen_file is None:
        raise ValueError("no class is unseen: give --unseen FILE, one class name a line")
    lines = read_classes(unseen_file)
    graph = load_graph(SHIPPED / f"{config.graph}.json" if known else config.graph)
    names = graph.names[: graph.classes]
    if any(line.split == "seen" for line in lines):  # a whole class list
        # A line may give its id alone.
        listed = [line.name or name for line, name in zip_longest(lines, names[: len(lines)])]
        require_classes(graph, listed, str(config.graph))
        if wrong := [line.id for line, synset in zip(lines, graph.ids) if line.id not in (None, synset)]:
            raise ValueError(f"{unseen_file}: {wrong[0]} is not the id that {config.graph} has in its place; "
                             f"build the "
                             "graph from this very list")
        indices = [k for k, line in enumerate(lines) if line.split == "unseen"]
    else:
        indices = listed_classes(lines, graph, str(unseen_file))
    check_unseen(torch.tensor(indices, dtype=torch.long), names)
    return graph, indices


def listed_classes(lines: Sequence[ClassLine], graph: Graph, origin: str) -> list[int]:
    """Indices of the classes of a list, by WordNet id where a line gives one, else by name.

    ValueError names those that are no class, or several.
    """
    names = graph.names[: graph.classes]
    place = {synset: k for k, synset in enumerate(graph.ids[: graph.classes])}
    if unknown := [line.id for line in lines if line.id and line.id not in place]:
        raise ValueError(f"{origin}: ids that are not among the graph's {graph.classes} classes: "
                         f"{some(unknown)}")
    several = set(duplicates([canonical(name) for name in names]))
    named = [line.name for line in lines if not line.id]
    if unclear := [name for name in named if canonical(name) in several]:
        raise ValueError(f"{origin}: {some(unclear)} names several classes; give the id too, `nXXXXXXXX "
                         "name`")
    by_name = unseen_indices(names, named) if named else []
    return sorted({place[line.id] for line in lines if line.id} | set(by_name))


def graph_digest(graph: Graph, unseen: Sequence[int]) -> str:
    """sha256 of what the method takes from a graph, so that a run is not resumed with another one."""
    content = [graph.ids, graph.names, graph.edges, graph.classes, list(unseen)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def class_folders(graph: Graph, ids: Mapping[str, str]) -> dict[str, int]:
    """{a folder's `folder_key`: class index}. A folder bears a class's name or WordNet id, or stands in
    `ids`, {folder: WordNet id}; a name of two classes is none.
    """
    keys = [folder_key(name) for name in graph.names[: graph.classes]]
    twice, place = set(duplicates(keys)), {synset: k for k, synset in enumerate(graph.ids[: graph.classes])}
    given = {folder_key(folder): place[synset] for folder, synset in ids.items() if synset in place}
    return {**{key: k for k, key in enumerate(keys) if key not in twice}, **place, **given}


def read_folder_ids(path: str) -> dict[str, str]:
    """--folder-ids: {folder: WordNet id} of a file with lines `folder nXXXXXXXX`, or of WebVision's `info`.

    In that folder `synsets.txt` has an id at the start of each line, and `queries_synsets_map.txt` lines `1
    1`: images of query 1, in folder q0001, belong to the first synset. Raises FileNotFoundError, or
    ValueError that names the line.
    """
    if not path:
        return {}
    info, ids = os.path.isdir(path), list[str]()
    if info:
        synsets = regular_file(Path(path) / "synsets.txt").read_text(encoding="utf-8").splitlines()
        ids = [line.split(maxsplit=1)[0] for line in synsets if line.strip()]
    file, found = regular_file(Path(path) / "queries_synsets_map.txt" if info else path), dict[str, str]()
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            folder, synset = line.rsplit(maxsplit=1)
            if info:
                folder, synset = f"q{int(folder):04d}", ids[range(1, len(ids) + 1).index(int(synset))]
            if not SYNSET_ID.fullmatch(synset):
                raise ValueError
        except ValueError:
            form = f"two numbers, the second of 1 to {len(ids)}" if info else "`folder nXXXXXXXX`"
            raise ValueError(f"--folder-ids {file}, line {number}: {line[:80]!r}; expected {form}") from None
        found[folder] = synset
    return found


def scan_folder(flag: str, root: str, graph: Graph, ids: Mapping[str, str] | None = None,
                only: Collection[int] | None = None, before: Sequence[str] = ()) -> Folder:
    """Lists `<root>/<class>/*` (AwA2: `<root>/JPEGImages/<class>/*`) without opening an image.

    before: names that `trees.with_gone` may add.

    ids: as `class_folders` has them. only: class indices; other folders are left out and stand in `skipped`.
    Raises FileNotFoundError for a missing folder, ValueError for one without images, images outside a class
    folder, and, without `only`, folders that are no class of the graph, which it lists.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{flag} {root}: no such folder; expected <folder>/<class>/<image>")
    if os.path.isdir(below := os.path.join(root, "JPEGImages")):
        root = below
    names = with_gone([name for name, *_ in list_images(os.path.realpath(root))], before)
    if stray := [name for name in names if os.path.dirname(name) == ""]:
        raise ValueError(f"{flag} {root}: {stray[0]} lies in no class folder; expected "
                         f"<folder>/<class>/<image>")
    known = class_folders(graph, ids or {})
    folders = [name.split(os.sep)[0] for name in names]
    found = {name: known.get(folder_key(name)) for name in sorted(set(folders))}
    if only is not None:
        found = {name: label if label in only else None for name, label in found.items()}
    skipped = [name for name, label in found.items() if label is None]
    if only is None and skipped:
        raise ValueError(f"{flag} {root}: folders that are none of the graph's {graph.classes} classes: "
                         f"{some(skipped)}; rename or remove them, or build a graph with these classes")
    if len(skipped) == len(found):
        raise ValueError(f"{flag} {root}: no folder bears the name of a seen class; there are "
                         f"{some(skipped)}")
    real = os.path.realpath(root)
    rows = [(os.path.join(real, name), found[folder]) for name, folder in zip(names, folders)]
    used = [(path, label) for path, label in rows if label is not None]
    labels, domain = [label for _, label in used], os.path.basename(real)
    files = Files([path for path, _ in used], [graph.names[label] for label in labels], [domain] * len(used))
    return Folder(root, files, labels, skipped)


def scan_sources(config: Config, graph: Graph, unseen: Sequence[int],
                 before: Listing | None = None) -> list[Folder]:
    """All `--source` folders, without class folders outside the seen classes.

    ValueError when there is no source, and with --strict-source when there are such class folders.
    """
    if not config.source or not config.target:
        raise ValueError("SRE-CLIP needs labelled and unlabelled images: give --source DIR [DIR ...] and "
                         "--target DIR")
    seen = set(range(graph.classes)) - set(unseen)
    ids = read_folder_ids(config.folder_ids)
    folders = [scan_folder("--source", root, graph, ids, seen, (before or {}).get(f"source {i}", ()))
               for i, root in enumerate(config.source)]
    for folder in folders:
        if folder.skipped and config.strict_source:
            raise ValueError(f"--source {folder.root} holds folders that are no seen class: "
                             f"{some(folder.skipped)}; "
                             "take them out, or leave out --strict-source")
    return folders


def summary(sources: Sequence[Folder], targets: Sequence[Folder], graph: Graph, unseen: Sequence[int]) -> str:
    """Counts of nodes, classes and images, and the seen classes that no source image is labelled with."""
    lines = [f"graph    {graph.classes} classes ({len(unseen)} unseen), {len(graph.ids)} nodes, "
             f"{len(graph.edges)} edges"]
    for part, folders in (("source", sources), ("target", targets)):
        lines += [f"{part}   {len(folder.files)} images, {len(set(folder.labels))} classes ({folder.root})"
                  for folder in folders]
    lines += [f"note     {folder.root}: {len(folder.skipped)} class folders outside the seen classes are not "
              f"used: {some(folder.skipped)}" for folder in sources if folder.skipped]
    labelled = {label for folder in sources for label in folder.labels}
    bare = [name for k, name in enumerate(graph.names[: graph.classes]) if k not in {*unseen, *labelled}]
    if bare:
        lines.append(f"note     seen classes without a source image: {some(bare)}")
    return "\n".join(map(plain, lines))


def features(folders: Sequence[Folder], graph: Graph, clip: CLIP, config: Config, cache: Path,
             device: torch.device) -> Features:
    """Features of the folders' images by the frozen tower, from `cache` or computed now and put there.

    An entry is used only for the same files (names, sizes, times), weights and preprocessing. Raises
    ValueError for an unreadable image, unless --bad-images skip.
    """
    model = [file_digest(config.weights), config.heads, config.precision, sorted(config.stroke_domains)]
    if config.image_reading != "upright":  # D19; without it the key is that of earlier versions
        model.append(config.image_reading)
    key = hashlib.sha256(json.dumps(model).encode()).hexdigest()
    encoder = Extractor(ZeroShot(clip, normalized=False), config, device)
    parts, paths, labels, skipped = [], [], [], 0
    for folder in folders:
        index = build_index(folder.root, encoder.of_paths(), key, cache, config.bad_images)
        label = dict(zip(folder.files.paths, folder.labels))
        found = [index.path(row) for row in range(len(index.paths))]
        used = [row for row, path in enumerate(found) if path in label]
        parts.append(index.features if len(used) == len(found) else index.features[used])
        skipped += len(folder.files) - len(used)
        paths += [found[row] for row in used]
        labels += [label[found[row]] for row in used]
    found_features = Features(parts, paths, torch.tensor(labels), skipped)
    return found_features.centred() if config.sre_center else found_features


@lru_cache(maxsize=8)
def shuffled(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def draw(n: int, b: int, iteration: int, *seed: object) -> Tensor:
    """Indices [min(b, n)] of an iteration: whole batches of shuffled passes over n images, a function of seed
    and iteration.

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
            yield (Batch(source.take(s).to(device), source.labels[s].to(device), target.take(t).to(device),
                         i),
                   [source.paths[k] for k in s.tolist()] + [target.paths[k] for k in t.tolist()])

    epochs = -(-config.sre_iterations // EPOCH)
    return Feed(epochs, order, batches, validates=partial(evaluates, config.sre_iterations))


def evaluates(iterations: int, epochs: int) -> bool:
    """Whether the released code evaluates on the test images after this many epochs of the loop (S6): where a
    multiple of a tenth of the iterations is passed, but not at the end. A run of one epoch is evaluated
    there.

    3,000 iterations: after 300, 600, ... 2,700.
    """
    done = epochs * EPOCH
    passed = 10 * done // iterations > 10 * (done - EPOCH) // iterations
    return passed and (done < iterations or epochs == 1)


def drawn(config: Config) -> Config:
    """The demonstration's config. Draws its source, photographs of the seen classes, and target, sketches of
    all classes.

    Raises ValueError when other folders are given as well.
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
