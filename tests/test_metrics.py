"""Oracles are double loops over sorted Python lists; float64 distances come from explicit differences."""

import json
import math
import re
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import fill
from ucdr_ref import metrics
from ucdr_ref.metrics import retrieval, search, squared_norms, zero_shot_accuracy

GOLDEN = json.loads((Path(__file__).parent / "golden" / "map_released.json").read_text())


def slow_ranking(query: Tensor, gallery: Tensor) -> list[list[int]]:
    """Gallery indices per query by (squared distance as float32, index)."""
    rankings = []
    for q in query.double().tolist():
        distances = [np.float32(math.fsum((x - y) ** 2 for x, y in zip(q, g))) for g in gallery.double().tolist()]
        rankings.append(sorted(range(len(distances)), key=lambda j: (distances[j], j)))
    return rankings


def slow_ap(hits: list[bool], divisor: float) -> float:
    return sum(sum(hits[:rank]) / rank for rank, hit in enumerate(hits, 1) if hit) / max(divisor, 1)


def slow_retrieval(query: Tensor, labels: Tensor, gallery: Tensor, gallery_labels: Tensor, k: int) -> list[dict[str, float]]:
    """Numbers of each query."""
    rows = []
    for label, ranking in zip(labels.tolist(), slow_ranking(query, gallery)):
        hits = [gallery_labels[j].item() == label for j in ranking]
        first = hits[:k]
        rows.append({f"mAP@{k}": slow_ap(first, sum(first)), f"mAP@{k}/relevant": slow_ap(first, min(sum(hits), len(first))),
                     f"Prec@{k}": sum(first) / len(first), "mAP@all": slow_ap(hits, sum(hits)),
                     "Prec@100": sum(hits[:100]) / len(hits[:100]), "no_relevant": not any(hits)})
    return rows


def random_case(seed: int, q: int, g: int, e: int, classes: int, ties: bool) -> tuple[Tensor, ...]:
    """With ties, coordinates are 0 or 1, so equal distances (and equal vectors) abound."""
    rng = torch.Generator().manual_seed(seed)
    query, gallery = torch.randn(q, e, generator=rng), torch.randn(g, e, generator=rng)
    if ties:
        query, gallery = (query > 0).float(), (gallery > 0).float()
    labels, gallery_labels = (torch.randint(0, classes, (n,), generator=rng) for n in (q, g))
    return query, labels, gallery, gallery_labels


CASES = {"plain": (7, 150, 4, 20), "k = 1": (7, 130, 4, 1), "gallery smaller than k": (5, 30, 3, 200),
         "one class only": (4, 60, 1, 10), "most classes absent": (30, 12, 40, 5), "one and one": (1, 1, 1, 3)}


@pytest.mark.parametrize(("q", "g", "classes", "k"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("ties", [False, True])
def test_retrieval_equals_double_loop(q, g, classes, k, ties, monkeypatch):
    query, labels, gallery, gallery_labels = random_case(q * g + k, q, g, 5, classes, ties)
    rows = slow_retrieval(query, labels, gallery, gallery_labels, k)
    for chunk in (1, 3, 1000):
        monkeypatch.setattr(metrics, "MEMORY_BUDGET", chunk * metrics.BYTES_PER_PAIR * g)
        result = retrieval(query, labels, gallery, gallery_labels, k=k)
        assert result["AP"].tolist() == pytest.approx([row[f"mAP@{k}"] for row in rows], abs=1e-6)
        assert result["no_relevant"] == sum(row["no_relevant"] for row in rows)
        for key in rows[0].keys() - {"no_relevant"}:
            assert result[key] == pytest.approx(fmean([row[key] for row in rows]), abs=1e-6), key
        assert [result[key] for key in ("queries", "gallery", "k", "k_used")] == [q, g, k, min(k, g)]
        for part, key in (("per_class", f"mAP@{k}"), ("per_class@all", "mAP@all")):
            assert list(result[part]) == sorted(set(labels.tolist()))
            for label, value in result[part].items():
                assert value == pytest.approx(fmean([row[key] for row, own in zip(rows, labels) if own == label]), abs=1e-6)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["tag"])
def test_released_numbers(case):
    tag, classes, dim = case["tag"], case["classes"], case["dim"]
    i, j = torch.arange(case["queries"]), torch.arange(case["gallery"])
    labels, gallery_labels = (7 * i + 3) % classes, (5 * j * j + j) % classes
    gallery_labels[gallery_labels == case["absent_class"]] = (case["absent_class"] + 1) % classes
    centres = fill(f"{tag}.centres", (classes, dim), case["separation"])
    query = centres[labels] + fill(f"{tag}.q", (len(i), dim), 1)
    gallery = centres[gallery_labels] + fill(f"{tag}.g", (len(j), dim), 1)
    result = retrieval(query, labels, gallery, gallery_labels)
    for key in ("mAP@200", "Prec@200", "mAP@all", "Prec@100"):
        assert result[key] == pytest.approx(case[key.replace("Prec", "prec")], abs=1e-5), key
    assert result["AP"].tolist() == pytest.approx(case["ap200_per_query"], abs=1e-5)
    assert result["no_relevant"] == case["ap200_per_query"].count(0.0)


def test_copies_keep_the_gallery_s_order():
    """Whatever the blocks of the product."""
    rng = torch.Generator().manual_seed(2)
    vector, query = torch.randn(1, 64, generator=rng), torch.randn(3, 64, generator=rng)
    labels = torch.arange(1000) < 500  # of the copies, the first half are relevant
    for device_order in (metrics._rank, lambda d: d.sort(dim=1, stable=True).indices):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(metrics, "_rank", device_order)
            found = retrieval(query, torch.ones(3, dtype=torch.bool), vector.expand(1000, 64), labels, k=700)
            assert found["Prec@700"] == pytest.approx(500 / 700) and found["mAP@700"] == 1.0
    gallery = torch.cat([50 + torch.randn(400, 64, generator=rng), vector.expand(12, 64)])
    gallery = gallery[torch.randperm(412, generator=rng)]
    copies = (gallery == vector).all(1).nonzero()[:, 0]
    assert torch.equal(search(query, gallery, k=7)[1], copies[:7].expand(3, 7))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("g", "k"), [(50, 1), (50, 10), (50, 50), (7, 20)])
def test_search_equals_full_sort(ties, g, k, monkeypatch):
    """Of the ties, at most 16 compete with the k-th: e = 9 gives few equal rows."""
    query, _, gallery, _ = random_case(g + k, 6, g, 9, 3, ties)
    expected = torch.tensor(slow_ranking(query, gallery))[:, :k]
    exact = ((query.double()[:, None] - gallery.double()) ** 2).sum(-1).sqrt().gather(1, expected)
    for budget in (1, 2**26):  # chunks of k + 16 rows, and one
        monkeypatch.setattr(metrics, "MEMORY_BUDGET", budget)
        for norms in (None, squared_norms(gallery)):
            distances, indices = search(query, gallery, k, norms)
            assert torch.equal(indices, expected)
            assert distances.dtype == torch.float32 and torch.allclose(distances.double(), exact, rtol=1e-6)


def test_candidates_of_the_scan_are_decided_in_float64(monkeypatch):
    """Vectors of length 1e3 at distances of 1: float32 products alone order them wrongly."""
    rng = torch.Generator().manual_seed(3)
    query, gallery = torch.randn(3, 24, generator=rng) + 200, torch.randn(700, 24, generator=rng) + 200
    expected = torch.tensor(slow_ranking(query, gallery))[:, :5]
    scan = (squared_norms(gallery) - 2 * query @ gallery.T).sort(stable=True).indices[:, :5]
    assert not torch.equal(scan, expected)
    for budget in (1, 2**14, 2**26):
        monkeypatch.setattr(metrics, "MEMORY_BUDGET", budget)
        assert torch.equal(search(query, gallery, 5)[1], expected)


def test_search_reads_a_memory_map(tmp_path, monkeypatch):
    query, _, gallery, _ = random_case(9, 3, 80, 8, 2, ties=False)
    np.save(tmp_path / "gallery.npy", gallery.numpy().astype(np.float16))
    mapped = np.load(tmp_path / "gallery.npy", mmap_mode="c")
    monkeypatch.setattr(metrics, "MEMORY_BUDGET", 1)
    found = search(query.numpy(), mapped, 9, squared_norms(mapped))[1]
    assert found.tolist() == [ranking[:9] for ranking in slow_ranking(query, torch.from_numpy(mapped))]


@pytest.mark.parametrize("value", [math.nan, -math.inf, 1e19])
@pytest.mark.parametrize("name", ["query", "gallery"])
def test_non_finite_features_are_an_error(name, value):
    rows = {"query": torch.ones(9, 3), "gallery": torch.ones(9, 3)}
    rows[name][[2, 5], 1] = value
    for refused in (lambda: retrieval(rows["query"], torch.ones(9), rows["gallery"], torch.ones(9)), lambda: search(**rows, k=2)):
        with pytest.raises(ValueError, match=rf"^2 of 9 {name} feature rows .* row 2\)"):
            refused()


@pytest.mark.parametrize("shapes", [([0, 3], [9, 3]), ([4, 3], [0, 3]), ([3], [9, 3]), ([4, 3], [9, 2])], ids=str)
def test_wrong_shapes_are_an_error(shapes):
    query, gallery = map(torch.ones, shapes)
    for refused in (lambda: retrieval(query, query, gallery, gallery), lambda: search(query, gallery, 1)):
        with pytest.raises(ValueError, match=re.escape(f"got {shapes[0]} and {shapes[1]}")):
            refused()
    with pytest.raises(ValueError, match=re.escape(f"labels [4] and [9], as many as features; got {shapes[0]}")):
        retrieval(torch.ones(4, 3), query, torch.ones(9, 3), gallery)
    for refused in (lambda: retrieval(*[torch.ones(1, 1), torch.ones(1)] * 2, k=0), lambda: search(*[torch.ones(1, 1)] * 2, 0)):
        with pytest.raises(ValueError, match="k must be at least 1; got 0"):
            refused()


def test_accuracies_equal_a_slow_loop():
    torch.manual_seed(3)
    labels, unseen = torch.randint(0, 5, (60,)), [1, 4]
    labels[labels == 2] = 3  # class 2 and class 5 have no image
    predicted = torch.stack([torch.randint(0, 6, (60,)), torch.tensor(unseen)[torch.randint(0, 2, (60,))]], dim=1)
    predicted[::2, 0] = labels[::2]
    hits: dict[str, dict[int, list[bool]]] = {"zsl": {}, "unseen": {}, "seen": {}}
    for (everywhere, among_unseen), y in zip(predicted.tolist(), labels.tolist()):
        hits["unseen" if y in unseen else "seen"].setdefault(y, []).append(everywhere == y)
        if y in unseen:
            hits["zsl"].setdefault(y, []).append(among_unseen == y)
    result = zero_shot_accuracy(predicted, labels, torch.tensor(unseen))
    for name, classes in hits.items():
        assert result["instance"][name] == pytest.approx(fmean(sum(classes.values(), [])))
        assert result["class"][name] == pytest.approx(fmean([fmean(one) for one in classes.values()]))
    assert result["instance"]["seen"] != pytest.approx(result["class"]["seen"])
    for values in result.values():
        assert values["h"] == pytest.approx(2 / (1 / values["unseen"] + 1 / values["seen"]))


def test_accuracies_without_hits_or_images():
    unseen = torch.tensor([2])
    wrong = zero_shot_accuracy(torch.tensor([[1, 2], [0, 2]]), torch.tensor([0, 2]), unseen)
    assert wrong["class"] == {"zsl": 1.0, "unseen": 0.0, "seen": 0.0, "h": 0.0}
    none = zero_shot_accuracy(torch.tensor([[0, 2], [1, 2], [2, 2]]), torch.tensor([0, 1, 0]), unseen)
    assert none["instance"]["unseen"] is none["instance"]["h"] is none["class"]["h"] is None and none["class"]["seen"] == 0.75
