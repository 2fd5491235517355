"""Class graph of SRE-CLIP: nodes, their names and hypernym edges, from JSON; normalised adjacency."""
from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..clip.tensorfile import read_text


@dataclass(frozen=True)
class Graph:
    """N nodes, the c classes first; an edge is (child, parent), as node numbers."""

    ids: list[str]  # WordNet synset ids, `n` and eight digits
    names: list[str]  # of a class as its list gives it, of an ancestor its first lemma
    lemmas: list[list[str]]
    edges: list[tuple[int, int]]
    classes: int
    notice: str  # WordNet's licence asks that it stay with every copy


def canonical(name: str) -> str:
    """A class name for comparison: lower case, single spaces for underscores and plus signs."""
    return " ".join(re.split(r"[\s_+]+", name.strip().lower()))


def duplicates(items: Sequence[str]) -> list[str]:
    return [item for item, count in Counter(items).items() if count > 1]


def load_graph(path: str | Path) -> Graph:
    """Reads `save_graph`'s file. Raises FileNotFoundError, or ValueError for malformed JSON or a bad edge."""
    text = read_text(path, "; build it with python -m ucdr_ref.sre.wordnet")
    try:
        return parse_graph(json.loads(text))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a class graph as ucdr_ref.sre.wordnet writes it "
                         f"({type(error).__name__}: {error}); build it again") from None


def parse_graph(fields: dict[str, Any]) -> Graph:
    """Checks types and lengths; raises KeyError, TypeError or ValueError with the reason."""
    ids, names, lemmas = ([*fields[key]] for key in ("ids", "names", "lemmas"))
    edges, classes = [(child, parent) for child, parent in fields["edges"]], fields["classes"]
    if not len(ids) == len(names) == len(lemmas):
        raise ValueError(f"{len(ids)} ids, {len(names)} names, {len(lemmas)} lemma lists")
    if not all(isinstance(number, int) for number in chain([classes], *edges)):
        raise TypeError("class count and edges must be whole numbers")
    if not all(isinstance(text, str) for text in chain(ids, names, *lemmas)):
        raise TypeError("ids, names and lemmas must be text")
    for edge in edges:
        if not all(0 <= node < len(ids) for node in edge):
            raise ValueError(f"edge {list(edge)} leaves the graph's {len(ids)} nodes")
    if not 0 < classes <= len(ids):
        raise ValueError(f"{classes} classes among {len(ids)} nodes")
    return Graph(ids, names, lemmas, edges, classes, str(fields.get("notice", "")))


def normalised_adjacency(edges: Sequence[tuple[int, int]], nodes: int) -> Tensor:
    """D^-1 (A + A^T + I) [N, N], rows sum to one, sparse: COO, whose product has a gradient everywhere."""
    edge = torch.tensor(edges, dtype=torch.long).view(len(edges), 2).T
    index = torch.cat([edge, edge.flip(0), torch.arange(nodes).expand(2, -1)], dim=1)
    degree = torch.bincount(index[0], minlength=nodes)
    values, size = 1 / degree[index[0]], (nodes, nodes)
    return torch.sparse_coo_tensor(index, values, size, check_invariants=True).coalesce()
