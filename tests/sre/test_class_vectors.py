from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests.helpers import tiny_state_dict
from ucdr_ref.clip.model import CLIP
from ucdr_ref.clip.zero_shot import class_text_features
from ucdr_ref.sre.graph import Graph, node_vectors

GRAPH = Graph(["n00000001", "n00000002", "n00000003", "n00000004"], ["killer whale", "horse", "odd thing", "whale"],
              [["killer whale", "orca"], ["horse", "Equus_caballus"], ["Thing"], ["whale"]], [(0, 3)], 3, "")
GLOVE = ["killer 1 0 0", "whale 0 1 0", "orca 0 0 1", "horse 2 0 0", "Horse 9 9 9", "equus 0 2 0", "thing 0 0 3", "other 1 x 2"]


def written(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_text_features_of_every_node_are_the_default():
    clip = CLIP.from_state_dict(tiny_state_dict())
    vectors = node_vectors(GRAPH, clip)
    assert_close(vectors, class_text_features(clip, ["killer whale", "horse", "odd thing", "whale"]))
    assert_close(vectors.norm(dim=1), torch.ones(4))


def test_ancestors_may_be_means_of_the_classes_below():
    names = ["cow", "horse", "tree", "palm tree"]  # a class may be the ancestor of another
    nodes = [*names, "ungulate", "plant", "entity"]
    edges = [(0, 4), (1, 4), (3, 2), (2, 5), (4, 6), (5, 6)]
    graph = Graph([f"n{k:08d}" for k in range(7)], nodes, [], edges, 4, "")
    clip = CLIP.from_state_dict(tiny_state_dict())
    own = class_text_features(clip, names)
    means = torch.stack([own[[0, 1]].mean(dim=0), own[[2, 3]].mean(dim=0), own.mean(dim=0)])
    assert_close(node_vectors(graph, clip, "clip-classes"), torch.cat([own, F.normalize(means, dim=1)]))
    loose = Graph([*graph.ids, "n00000099"], [*nodes, "loose end"], [], edges, 4, "")
    with pytest.raises(ValueError, match="without a class vector: loose end$"):
        node_vectors(loose, clip, "clip-classes")


def test_word_vectors_are_averaged_over_lemmas(tmp_path):
    vectors = node_vectors(GRAPH, None, written(tmp_path / "glove.txt", *GLOVE))  # no CLIP needed
    expected = torch.tensor([[0.25, 0.25, 0.5], [1, 1, 0], [0, 0, 1], [0, 1, 0]])
    assert_close(vectors, F.normalize(expected, dim=1))
    expected[1] = 1
    vectors = node_vectors(GRAPH, None, written(tmp_path / "glove.txt", "10 3", "", *GLOVE, "n00000002 1 1 1"))
    assert_close(vectors, F.normalize(expected, dim=1))


def test_bad_vector_files(tmp_path):
    path = tmp_path / "vectors.txt"
    with pytest.raises(FileNotFoundError, match="does not exist; class vectors are"):
        node_vectors(GRAPH, None, str(path))
    for lines, message in ((["whale 0 1 0"], "without a class vector: horse, odd thing"),
                           ([*GLOVE, "n00000002 1 nan 2"], "without a class vector: horse"),
                           ([*GLOVE[:3], "horse 0 1"], "line 4: not a word and 3 numbers")):
        with pytest.raises(ValueError, match=message):
            node_vectors(GRAPH, None, written(path, *lines))


def test_classes_with_identical_vectors_are_named(tmp_path):
    names = ["chihuahua", "persian cat", "siamese cat", "cat", "dog"]
    graph = Graph([f"n{k:08d}" for k in range(5)], names, [[]] * 5, [(0, 4), (1, 3), (2, 3)], 3, "")
    numbers = ["1 0", "0 1", "0 2", "0 3", "1 1"]  # an ancestor may share
    file = written(tmp_path / "v.txt", *(f"{node} {number}" for node, number in zip(graph.ids, numbers)))
    with pytest.raises(ValueError, match="'persian cat' and 'siamese cat' have identical"):
        node_vectors(graph, None, file)
    told_apart = replace(graph, edges=[(0, 4), (1, 3), (2, 3), (2, 4)])  # by the graph
    assert len(node_vectors(told_apart, None, file)) == 5
