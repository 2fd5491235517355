from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests.helpers import tiny_state_dict
from ucdr_ref.clip.model import CLIP
from ucdr_ref.clip.zero_shot import class_text_features
from ucdr_ref.sre.class_vectors import check_vectors, node_vectors, read_vectors
from ucdr_ref.sre.graph import Graph


def small_graph() -> Graph:
    return Graph(["n00000001", "n00000002", "n00000003", "n00000004"], ["killer whale", "horse", "odd thing", "whale"],
                 [["killer whale", "orca"], ["horse", "Equus caballus"], ["thingy"], ["whale"]], [(0, 3)], 3, "")


def test_text_features_of_every_node_are_the_default() -> None:
    clip = CLIP.from_state_dict(tiny_state_dict())
    vectors = node_vectors(small_graph(), clip)
    assert_close(vectors, class_text_features(clip, ["killer whale", "horse", "odd thing", "whale"]))
    assert_close(vectors.norm(dim=1), torch.ones(4))


def test_ancestors_may_be_means_of_the_classes_below() -> None:
    names = ["cow", "horse", "tree", "palm tree"]  # a class may be the ancestor of another
    nodes = [*names, "ungulate", "plant", "entity"]
    edges = [(0, 4), (1, 4), (3, 2), (2, 5), (4, 6), (5, 6)]
    graph = Graph([f"n{k:08d}" for k in range(7)], nodes, [[name] for name in nodes], edges, 4, "")
    clip = CLIP.from_state_dict(tiny_state_dict())
    own = class_text_features(clip, names)
    means = torch.stack([own[[0, 1]].mean(dim=0), own[[2, 3]].mean(dim=0), own.mean(dim=0)])
    assert_close(node_vectors(graph, clip, "clip-classes"), torch.cat([own, F.normalize(means, dim=1)]))
    classes_alone = Graph(graph.ids[:4], names, [[name] for name in names], [(3, 2)], 4, "")
    assert_close(node_vectors(classes_alone, clip, "clip-classes"), own)
    loose = Graph([*graph.ids, "n00000099"], [*nodes, "loose end"], [*graph.lemmas, []], edges, 4, "")
    with pytest.raises(ValueError, match="without a class vector: loose end"):
        node_vectors(loose, clip, "clip-classes")


def test_word_vectors_are_averaged_over_lemmas(tmp_path: Path) -> None:
    path = tmp_path / "glove.txt"
    lines = ["killer 1 0 0", "whale 0 1 0", "orca 0 0 1", "horse 2 0 0", "Horse 9 9 9", "equus 0 2 0", "odd 0 0 3",
             "other 1 x 2"]
    path.write_text("\n".join(lines))
    vectors = read_vectors(path, small_graph())
    expected = torch.tensor([[0.25, 0.25, 0.5], [1, 1, 0], [0, 0, 1], [0, 1, 0]])
    assert_close(vectors, F.normalize(expected, dim=1))
    path.write_text("10 3\n" + "\n".join([*lines, "killer_whale 0 4 0", "n00000002 1 1 1", "a b thingy 1 2 3", "thingy 3 2 1"]))
    vectors = read_vectors(path, small_graph())
    expected = torch.tensor([[0, 2, 0.5], [1, 1, 1], [3, 2, 1], [0, 1, 0]])
    assert_close(vectors, F.normalize(expected, dim=1))
    assert_close(node_vectors(small_graph(), None, str(path)), vectors)  # no CLIP needed


def test_bad_vector_files(tmp_path: Path) -> None:
    path = tmp_path / "vectors.txt"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_vectors(path, small_graph())
    path.write_text("whale 0 1 0\n")
    with pytest.raises(ValueError, match="2 of 4 graph nodes: horse, odd thing"):
        read_vectors(path, small_graph())
    for bad in ("whale 0 1", "whale 0 one 0", "whale 0 nan 0"):
        path.write_text(f"horse 1 2 3\n{bad}\n")
        with pytest.raises(ValueError, match="line 2: 'whale 0 .*3 finite numbers"):
            read_vectors(path, small_graph())


def test_missing_and_identical_vectors_are_named() -> None:
    names = ["chihuahua", "persian cat", "siamese cat", "cat"]
    vectors = torch.eye(4)
    check_vectors(vectors, names, 3)
    twin = vectors[[0, 1, 1, 1]]
    with pytest.raises(ValueError, match="'persian cat' and 'siamese cat' have identical"):
        check_vectors(twin, names, 3)
    check_vectors(vectors[[0, 1, 2, 1]], names, 3)  # an ancestor may share
    check_vectors(twin, names, 3, [(k, 3 + k) for k in range(3)])  # so may classes that the graph tells apart
    for value in (0.0, float("nan")):
        vectors[0] = value
        with pytest.raises(ValueError, match=r"without a class vector: chihuahua \("):
            check_vectors(vectors, names, 3)
