"""Vectors of a class graph's nodes, L2-normalised: CLIP's text features, or a file of word vectors."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clip.model import CLIP
from ..clip.tensorfile import regular_file
from ..clip.zero_shot import class_text_features
from .graph import Graph, canonical


def node_vectors(graph: Graph, clip: CLIP, source: str = "clip") -> Tensor:
    """X [N, w] on the CPU: text features of "a photo of a {name}" for every node, or `source`, a file (S4).

    source "clip-classes": text features of the classes alone, and for an ancestor the mean over the classes
    below it, where a text tower knows the classes' names but no such words as `vertebrate`.
    Raises ValueError for a node without a vector, two classes with identical vectors and parents, and a
    malformed file.
    """
    if source == "clip":
        vectors = class_text_features(clip, graph.names).cpu()
    elif source == "clip-classes":
        vectors = means_of_classes(class_text_features(clip, graph.names[: graph.classes]).cpu(), graph)
    else:
        vectors = read_vectors(source, graph)  # S4
    check_vectors(vectors, graph.names, graph.classes, graph.edges)
    return vectors


def means_of_classes(vectors: Tensor, graph: Graph) -> Tensor:
    """class vectors [c, w] -> X [N, w]: an ancestor's is the normalised mean over the classes below it."""
    below = [{k} if k < graph.classes else set() for k in range(len(graph.ids))]
    size = 0
    while size != (size := sum(map(len, below))):
        for child, parent in graph.edges:
            below[parent] |= below[child]
    means = torch.stack([vectors[sorted(members)].mean(dim=0) for members in below])
    return torch.cat([vectors, F.normalize(means[graph.classes:], dim=1)])


def read_vectors(path: str | Path, graph: Graph) -> Tensor:
    """X [N, w] from GloVe-style text, `word v1 v2 ...` a line.

    A line under a node's synset id is that node's vector. Otherwise it is the mean over the synset's lemmas
    that have one (the node's name when none has): the vector of the lemma joined by `_` or `-`, or else the
    mean over its words. Raises FileNotFoundError, or ValueError for a malformed line and for nodes without a
    vector, which it names.
    """
    wanted = set(graph.ids)
    for text in chain(graph.names, *graph.lemmas):
        wanted.update(*forms(text))
    table = read_table(path, wanted)
    rows = [node_vector(table, graph, k) for k in range(len(graph.ids))]
    if missing := [name for name, row in zip(graph.names, rows) if row is None]:
        raise ValueError(f"{path} has no vector for {len(missing)} of {len(rows)} graph nodes: "
                         f"{', '.join(missing)}")
    return F.normalize(torch.stack([row for row in rows if row is not None]), dim=1)


def forms(text: str) -> tuple[list[str], list[str]]:
    """The keys of a lemma as one word, the best first, and the single words of it."""
    name = canonical(text)
    words = name.replace("-", " ").split()
    return [name.replace(" ", "_"), "_".join(words), "-".join(words)], words


def node_vector(table: dict[str, Tensor], graph: Graph, k: int) -> Tensor | None:
    if graph.ids[k] in table:
        return table[graph.ids[k]]
    found = [vector for lemma in graph.lemmas[k] if (vector := phrase_vector(table, lemma)) is not None]
    return torch.stack(found).mean(dim=0) if found else phrase_vector(table, graph.names[k])


def phrase_vector(table: dict[str, Tensor], text: str) -> Tensor | None:
    whole, words = forms(text)
    found = [table[key] for key in whole if key in table][:1] or [table[key] for key in words if key in table]
    return torch.stack(found).mean(dim=0) if found else None


def read_table(path: str | Path, wanted: set[str]) -> dict[str, Tensor]:
    """The wanted lines of a vector file; a lower-case spelling goes before others."""
    table: dict[str, Tensor] = {}
    width = 0
    advice = "; class vectors are clip, clip-classes or a file of `word v1 v2 ...` lines"
    with open(regular_file(path, advice), encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            fields = line.split()
            if not fields or (number == 1 and len(fields) == 2):  # word2vec's header
                continue
            width = width or len(fields) - 1
            word = "_".join(fields[:-width]) or fields[0]  # some GloVe files hold words with spaces
            key = word if word in wanted else word.lower()
            if key not in wanted or (key in table and key != word):
                continue
            try:
                vector = torch.tensor([float(value) for value in fields[1:][-width:]])
            except ValueError:
                vector = torch.empty(0)
            if len(vector) != width or not vector.isfinite().all():
                raise ValueError(f"{path}, line {number}: {line[:60]!r} is not a word and {width} finite "
                                 "numbers")
            table[key] = vector
    return table


def check_vectors(vectors: Tensor, names: Sequence[str], classes: int,
                  edges: Sequence[tuple[int, int]] = ()) -> None:
    """vectors [N, w] of the nodes `names`, L2-normalised, `classes` of them first; edges (child, parent).

    Raises ValueError that names the nodes without a vector (zero or not finite), or two classes that share
    one and their parents too: no image could ever be told to be of the second. (ImageNet's two cranes have
    other parents.)
    """
    norms = torch.linalg.vector_norm(vectors, dim=1)
    there = (norms > 0) & norms.isfinite()
    if missing := [name for name, found in zip(names, there.tolist()) if not found]:
        raise ValueError(f"graph nodes without a class vector: {', '.join(missing)} (zero or not finite)")
    parents: dict[int, set[int]] = defaultdict(set)
    for child, parent in edges:
        parents[child].add(parent)
    x = vectors[:classes]
    for start in range(0, classes, 1024):
        near = (x[start : start + 1024] @ x.T > 1 - 1e-6).triu(start + 1).nonzero()
        for i, j in (near + torch.tensor([start, 0])).tolist():
            if parents[i] == parents[j] and torch.allclose(x[i], x[j], rtol=0, atol=1e-6):
                raise ValueError(f"classes {names[i]!r} and {names[j]!r} have identical vectors, which tell "
                                 "none of their images apart; give one of them another name or vector")
