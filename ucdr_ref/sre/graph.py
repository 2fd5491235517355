"""Class graph of SRE-CLIP: JSON file, normalised adjacency, class vectors of the nodes.

The file holds the fields of `Graph`; an edge is [child, parent], node numbers from 0:

    {"ids": ["n02129604", "n02127808"], "names": ["tiger", "big cat"], "lemmas": [["tiger"], ["big cat"]],
     "edges": [[0, 1]], "classes": 1, "notice": "WordNet 3.0 Copyright ..."}
"""
from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clip.model import CLIP
from ..clip.weights import check_file, read_text
from ..clip.zero_shot import class_text_features


@dataclass(frozen=True)
class Graph:
    """N nodes, the c classes first."""

    ids: list[str]  # WordNet's, `n` and eight digits
    names: list[str]  # of a class as its list gives it, of an ancestor its first lemma
    lemmas: list[list[str]]
    edges: list[tuple[int, int]]  # (child, parent)
    classes: int
    notice: str  # WordNet's licence asks that it stay with every copy


def canonical(name: str) -> str:
    """A class name for comparison: lower case, single spaces for underscores and plus signs."""
    return " ".join(re.split(r"[\s_+]+", name.strip().lower()))


def duplicates(items: Sequence[str]) -> list[str]:
    return [item for item, count in Counter(items).items() if count > 1]


def save_graph(graph: Graph, path: str | Path) -> None:
    """Writes JSON, one field per line."""
    fields = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in asdict(graph).items())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("{\n" + ",\n".join(fields) + "\n}\n", encoding="utf-8")


def load_graph(path: str | Path) -> Graph:
    """Raises FileNotFoundError, or ValueError for a file that is no class graph."""
    text = read_text(path, "; build it with python -m ucdr_ref.sre.wordnet")
    try:
        return parse_graph(json.loads(text))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a class graph as ucdr_ref.sre.wordnet writes it "
                         f"({type(error).__name__}: {error}); build it again") from None


def parse_graph(fields: dict[str, Any]) -> Graph:
    """A Graph from its JSON object; raises KeyError, TypeError or ValueError with the reason."""
    graph = Graph(**{**fields, "edges": [(child, parent) for child, parent in fields["edges"]]})
    nodes, ends = len(graph.ids), [*chain(*graph.edges)]
    if not all(isinstance(text, str) for text in chain(graph.ids, graph.names, *graph.lemmas)):
        raise TypeError("ids, names and lemmas must be text")
    if not all(type(number) is int for number in [graph.classes, *ends]):
        raise TypeError("classes and edges must be whole numbers")
    if not nodes == len(graph.names) == len(graph.lemmas) >= graph.classes > 0:
        raise ValueError(f"{nodes} ids, {len(graph.names)} names, {len(graph.lemmas)} lists of lemmas, "
                         f"{graph.classes} classes")
    if ends and not 0 <= min(ends) <= max(ends) < nodes:
        raise ValueError(f"edges between nodes {min(ends)} to {max(ends)} of {nodes}")
    return graph


def normalized_adjacency(edges: Sequence[tuple[int, int]], nodes: int) -> Tensor:
    """Â = D^-1 (A + A^T + I) [N, N], rows sum to one; sparse COO, whose product has a gradient everywhere."""
    child, parent = torch.tensor(edges, dtype=torch.long).view(-1, 2).T
    self_loop = torch.arange(nodes)
    index = torch.stack([torch.cat([child, parent, self_loop]), torch.cat([parent, child, self_loop])])
    degree = index[0].bincount()
    size = (nodes, nodes)
    return torch.sparse_coo_tensor(index, 1 / degree[index[0]], size, check_invariants=True).coalesce()


def node_vectors(graph: Graph, clip: CLIP, source: str = "clip") -> Tensor:
    """X [N, w] on the CPU, rows L2-normalised (S4).

    source "clip": text features of "a photo of a {name}" for every node; "clip-classes": of the classes, and
    for an ancestor the mean over the classes below it, where a text tower knows no such words as
    `vertebrate`; else a file of word vectors.
    Raises ValueError for a node without a vector, and for two classes with identical vectors and parents.
    """
    c, names = graph.classes, graph.names
    if source == "clip":
        x = class_text_features(clip, names).cpu()
    elif source == "clip-classes":
        x = with_ancestors(class_text_features(clip, names[:c]).cpu(), graph)
    else:
        x = read_vectors(source, graph)
    norms = x.norm(dim=1).tolist()
    if missing := [name for name, norm in zip(names, norms) if not 0 < norm < torch.inf]:
        raise ValueError(f"graph nodes without a class vector: {', '.join(missing)}; the file needs a line "
                         "under the name or the WordNet id of each")
    parents = parents_of(graph)
    for i, j in (x[:c] @ x[:c].T > 1 - 1e-6).triu(1).nonzero().tolist():
        if parents[i] == parents[j]:  # no image could ever be predicted as the second
            raise ValueError(f"classes {names[i]!r} and {names[j]!r} have identical vectors, which tell none "
                             "of their images apart; give one of them another name or vector")
    return x


def parents_of(graph: Graph) -> list[set[int]]:
    parents: list[set[int]] = [set() for _ in graph.ids]
    for child, parent in graph.edges:
        parents[child].add(parent)
    return parents


def with_ancestors(vectors: Tensor, graph: Graph) -> Tensor:
    """Class vectors [c, w] -> X [N, w]: an ancestor's is the normalised mean over the classes below it."""
    parents, below = parents_of(graph), [list[int]() for _ in graph.ids]
    for k in range(graph.classes):
        above = [k]
        for node in above:  # grows: the class and all its ancestors
            above += [parent for parent in parents[node] if parent not in above]
            below[node].append(k)
    means = [vectors[classes].mean(dim=0, keepdim=True) for classes in below[graph.classes:]]
    return torch.cat([vectors, *(F.normalize(mean, dim=1) for mean in means)])


def read_vectors(path: str | Path, graph: Graph) -> Tensor:
    """X [N, w] from GloVe-style text, `word v1 v2 ...` a line, words in lower case.

    A node's vector is that under its WordNet id, or else the mean over its lemmas: of `killer whale` the
    vector of `killer_whale`, or else the mean over `killer` and `whale`; 0 where there is none.
    Raises FileNotFoundError, or ValueError that names a malformed line.
    """
    def spellings(lemma: str) -> tuple[str, list[str]]:
        return canonical(lemma).replace(" ", "_"), re.split("[ -]", canonical(lemma))

    wanted = set(graph.ids)
    for whole, words in map(spellings, chain(*graph.lemmas)):
        wanted |= {whole, *words}
    table: dict[str, Tensor] = {}
    width = 0
    file = check_file(path, "; class vectors are clip, clip-classes or a file of `word v1 v2 ...` lines")
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            word, _, values = line.partition(" ")
            if word in wanted:
                width = width or len(values.split()) or 1
                try:
                    table[word] = torch.tensor([float(value) for value in values.split()]).view(width)
                except (ValueError, RuntimeError):
                    raise ValueError(f"{path}, line {number}: {line[:60]!r} is not a word and {width} numbers"
                                     ) from None

    rows = []
    for synset, lemmas in zip(graph.ids, graph.lemmas):
        found = []
        for whole, words in map(spellings, lemmas):
            known = [table[key] for key in ([whole] if whole in table else words) if key in table]
            if known:
                found.append(torch.stack(known).mean(dim=0))
        of_lemmas = torch.stack(found).mean(dim=0) if found else torch.zeros(width)
        rows.append(table.get(synset, of_lemmas))
    return F.normalize(torch.stack(rows), dim=1)
