"""Class graph of SRE-CLIP: JSON file, normalised adjacency, class vectors of the nodes."""
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clip.model import CLIP
from ..clip.weights import check_file, read_text
from ..clip.zero_shot import class_text_features


@dataclass(frozen=True)
class Graph:
    """N nodes, the c classes first; a file is a JSON object of these fields."""

    ids: list[str]  # WordNet's, `n` and eight digits
    names: list[str]  # of a class as its list gives it, of an ancestor its first lemma
    lemmas: list[list[str]]
    edges: list[tuple[int, int]]  # (child, parent), node numbers from 0
    classes: int
    notice: str  # WordNet's licence asks that it stay with every copy


def canonical(name: str) -> str:
    """Lower case, single spaces for underscores and plus signs"""
    return " ".join(re.split(r"[\s_+]+", name.strip().lower()))


def save_graph(graph: Graph, path: str | Path) -> None:
    Path(path).write_text(json.dumps(asdict(graph)) + "\n", encoding="utf-8")


def load_graph(path: str | Path) -> Graph:
    """Raises FileNotFoundError, or ValueError for a file that is no class graph."""
    advice = "; build it with python -m ucdr_ref.sre.wordnet"
    text = read_text(path, advice)
    try:
        fields = json.loads(text)
        fields["edges"] = [(child, parent) for child, parent in fields["edges"]]
        graph = Graph(**fields)
        nodes = len(graph.ids)
        inside = all(0 <= node < nodes for node in chain(*graph.edges))
        if not (inside and nodes == len(graph.names) == len(graph.lemmas) >= graph.classes > 0):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is not a whole class graph{advice}") from None
    return graph


def normalized_adjacency(edges: Sequence[tuple[int, int]], nodes: int) -> Tensor:
    """Â = D^-1 (A + A^T + I) [N, N], rows sum to one, sparse"""
    child, parent = torch.tensor(edges, dtype=torch.long).view(-1, 2).T
    self_loop = torch.arange(nodes)
    index = torch.stack([torch.cat([child, parent, self_loop]), torch.cat([parent, child, self_loop])])
    values = 1 / index[0].bincount()[index[0]]
    return torch.sparse_coo_tensor(index, values, (nodes, nodes), check_invariants=True).coalesce()


def node_vectors(graph: Graph, clip: CLIP, source: str = "clip") -> Tensor:
    """X [N, w] on the CPU, rows L2-normalised (S4).

    source "clip": text features of "a photo of a {name}" for every node; "clip-classes": of the classes, and
    for an ancestor the mean over the classes below it; else a file of word vectors.
    Raises ValueError for a node without a vector, and two classes with identical vectors and parents.
    """
    c, names = graph.classes, graph.names
    if source == "clip":
        x = class_text_features(clip, names).cpu()
    elif source == "clip-classes":
        x = with_ancestors(class_text_features(clip, names[:c]).cpu(), graph)
    else:
        x = read_vectors(source, graph)
    if missing := [name for name, norm in zip(names, x.norm(dim=1).tolist()) if not norm > 0]:
        raise ValueError(f"graph nodes without a class vector: {', '.join(missing)}")
    parents = parents_of(graph)
    for i, j in (x[:c] @ x[:c].T > 1 - 1e-6).triu(1).nonzero().tolist():
        if parents[i] == parents[j]:  # no image could ever be predicted as the second
            raise ValueError(f"classes {names[i]!r} and {names[j]!r} have identical vectors; rename one")
    return x


def parents_of(graph: Graph) -> list[set[int]]:
    parents: list[set[int]] = [set() for _ in graph.ids]
    for child, parent in graph.edges:
        parents[child].add(parent)
    return parents


def with_ancestors(vectors: Tensor, graph: Graph) -> Tensor:
    """Class vectors [c, w] -> X [N, w]: an ancestor's is the normalised mean over the classes below it"""
    parents, below = parents_of(graph), [list[int]() for _ in graph.ids]
    for k in range(graph.classes):
        above = [k]
        for node in above:  # grows to the class and all its ancestors
            above += [parent for parent in parents[node] if parent not in above]
            below[node].append(k)
    x = F.normalize(torch.stack([vectors[classes].mean(dim=0) for classes in below]), dim=1)
    x[:graph.classes] = vectors
    return x


def read_vectors(path: str | Path, graph: Graph) -> Tensor:
    """X [N, w] from GloVe-style text, `word v1 v2 ...` a line, words in lower case.

    A node's vector is that of its WordNet id, else the mean over its lemmas, of which each is the mean over
    its words that are found, else 0. Raises FileNotFoundError, or ValueError for a malformed line.
    """
    nodes = [[canonical(lemma).split() for lemma in lemmas] for lemmas in graph.lemmas]
    wanted = {*graph.ids, *chain(*chain(*nodes))}
    table: dict[str, Tensor] = {}
    width = 0
    file = check_file(path, "; class vectors are clip, clip-classes or a file")
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            word, _, values = line.partition(" ")
            if word in wanted:
                numbers = values.split()
                width = width or len(numbers) or 1
                try:
                    table[word] = torch.tensor([float(value) for value in numbers]).view(width)
                except (ValueError, RuntimeError):
                    raise ValueError(f"{path}, line {number}: not a word and {width} numbers") from None

    rows = []
    for synset, lemmas in zip(graph.ids, nodes):
        found = [[table[word] for word in words if word in table] for words in lemmas]
        means = [torch.stack(vectors).mean(dim=0) for vectors in found if vectors]
        of_lemmas = torch.stack(means).mean(dim=0) if means else torch.zeros(width)
        rows.append(table.get(synset, of_lemmas))
    return F.normalize(torch.stack(rows), dim=1)
