"""Oracles are double loops over sorted Python lists; float64 distances come from explicit differences."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import fill
from ucdr_ref import metrics
from ucdr_ref.metrics import (
    average_precision,
    class_means,
    retrieval,
    search,
    squared_norms,
    zero_shot_accuracy,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "map_released.json").read_text())


def slow_ranking(query: Tensor, gallery: Tensor) -> list[list[int]]:
    """Gallery indices per query by (squared distance as float32, index)."""
    rankings = []
    for q in query.double().tolist():
        distances = [np.float32(math.fsum((x - y) ** 2 for x, y in zip(q, g))) for g in gallery.double().tolist()]
        rankings.append(sorted(range(len(distances)), key=lambda j: (distances[j], j)))
    return rankings


def slow_ap(hits: list[bool], divisor: float) -> float:
    seen, total = 0, 0.0
    for rank, hit in enumerate(hits, start=1):
        if hit:
            seen += 1
            total += seen / rank
    return total / divisor if divisor else 0.0


def slow_retrieval(query: Tensor, labels: Tensor, gallery: Tensor, gallery_labels: Tensor, k: int) -> dict[str, Any]:
    rows: dict[str, list[float]] = {name: [] for name in ("AP", "relevant", "Prec", "AP@all", "Prec@100")}
    cut, hundred, no_relevant = min(k, len(gallery)), min(100, len(gallery)), 0
    for label, ranking in zip(labels.tolist(), slow_ranking(query, gallery)):
        hits = [gallery_labels[j].item() == label for j in ranking]
        rows["AP"].append(slow_ap(hits[:cut], sum(hits[:cut])))
        rows["relevant"].append(slow_ap(hits[:cut], min(sum(hits), cut)))
        rows["Prec"].append(sum(hits[:cut]) / cut)
        rows["AP@all"].append(slow_ap(hits, sum(hits)))
        rows["Prec@100"].append(sum(hits[:hundred]) / hundred)
        no_relevant += not any(hits)
    return {**rows, "no_relevant": no_relevant}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def random_case(seed: int, q: int, g: int, e: int, classes: int, ties: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_retrieval_equals_double_loop(q: int, g: int, classes: int, k: int, ties: bool, chunk: int,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    query, labels, gallery, gallery_labels = random_case(q * g + k, q, g, 5, classes, ties)
    expected = slow_retrieval(query, labels, gallery, gallery_labels, k)
    monkeypatch.setattr(metrics, "MEMORY_BUDGET", chunk * metrics.BYTES_PER_PAIR * g)
    result = retrieval(query, labels, gallery, gallery_labels, k=k)
    for key in ("AP", "AP@all"):
        assert result[key].tolist() == pytest.approx(expected[key], abs=1e-6)
    named = {f"mAP@{k}": "AP", f"mAP@{k}/relevant": "relevant", f"Prec@{k}": "Prec", "mAP@all": "AP@all",
             "Prec@100": "Prec@100"}
    for key, name in named.items():
        assert result[key] == pytest.approx(mean(expected[name]), abs=1e-6), key
    assert (result["queries"], result["gallery"], result["no_relevant"]) == (q, g, expected["no_relevant"])
    assert (result["k"], result["k_used"]) == (k, min(k, g))
    for suffix in ("", "@all"):
        per_class = result[f"per_class{suffix}"]
        assert list(per_class) == sorted(set(labels.tolist()))
        for label, value in per_class.items():
            own = [ap for ap, own_label in zip(expected[f"AP{suffix}"], labels.tolist()) if own_label == label]
            assert value == pytest.approx(mean(own), abs=1e-6)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["tag"])
def test_released_numbers(case: dict[str, Any]) -> None:
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
    # The recorded count is of the queries labelled with the absent class. In two cases the gallery labels miss
    # further classes, and there the recorded AP is 0 too.
    assert int((labels == case["absent_class"]).sum()) == case["queries_without_relevant"]
    assert result["no_relevant"] == sum(label not in gallery_labels for label in labels)
    assert result["no_relevant"] == case["ap200_per_query"].count(0.0)


def test_average_precision_by_hand() -> None:
    hits = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]]).bool()
    by_hand = [(1 / 1 + 2 / 3) / 2, 0.0, (1 / 2 + 2 / 3 + 3 / 4) / 3]
    assert average_precision(hits).tolist() == pytest.approx(by_hand)
    relevant = torch.tensor([10, 3, 3])  # more than the list holds: divided by its length, 4
    standard = average_precision(hits, relevant).tolist()
    assert standard == pytest.approx([(1 / 1 + 2 / 3) / 4, 0.0, by_hand[2]])
    assert average_precision(hits.view(3, 1, 4)).shape == (3, 1)


def test_class_means() -> None:
    assert class_means(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([7, 3, 7])) == {3: 2.0, 7: 3.5}


def test_copies_keep_the_gallery_s_order() -> None:
    """A thousand copies of one vector: whatever the blocks of the product, the first in the gallery come first."""
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
def test_search_equals_full_sort(ties: bool, g: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_candidates_of_the_scan_are_decided_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors of length 1e3 at distances of 1: float32 products alone order them wrongly."""
    rng = torch.Generator().manual_seed(3)
    query, gallery = torch.randn(3, 24, generator=rng) + 200, torch.randn(700, 24, generator=rng) + 200
    expected = torch.tensor(slow_ranking(query, gallery))[:, :5]
    scan = (squared_norms(gallery) - 2 * query @ gallery.T).sort(stable=True).indices[:, :5]
    assert not torch.equal(scan, expected)
    for budget in (1, 2**14, 2**26):
        monkeypatch.setattr(metrics, "MEMORY_BUDGET", budget)
        assert torch.equal(search(query, gallery, 5)[1], expected)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_search_reads_a_memory_map(tmp_path: Path, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    query, _, gallery, _ = random_case(9, 3, 80, 8, 2, ties=False)
    np.save(tmp_path / "gallery.npy", gallery.numpy().astype(dtype))
    mapped = np.load(tmp_path / "gallery.npy", mmap_mode="r")
    expected = slow_ranking(query, torch.from_numpy(np.array(mapped)))
    monkeypatch.setattr(metrics, "MEMORY_BUDGET", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for norms in (None, squared_norms(mapped)):
            _, indices = search(query.numpy(), mapped, 9, norms)
            assert indices.tolist() == [ranking[:9] for ranking in expected]


def test_search_and_retrieval_agree() -> None:
    query, labels, gallery, gallery_labels = random_case(11, 8, 90, 9, 3, ties=True)
    result = retrieval(query.numpy(), labels.tolist(), gallery.numpy(), gallery_labels.numpy(), k=15)
    hits = gallery_labels[search(query, gallery, k=15)[1]] == labels[:, None]
    assert torch.equal(average_precision(hits), result["AP"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e19])
def test_non_finite_features_are_an_error(value: float) -> None:
    query, labels, gallery, gallery_labels = random_case(1, 4, 9, 3, 2, ties=False)
    broken = gallery.clone()
    broken[[2, 5], 1] = value
    for refused in (lambda: retrieval(query, labels, broken, gallery_labels), lambda: search(query, broken, 2),
                    lambda: squared_norms(broken.numpy())):
        with pytest.raises(ValueError, match=r"^2 of 9 gallery feature rows .* row 2\)"):
            refused()
    for refused in (lambda: retrieval(broken, gallery_labels, gallery, gallery_labels), lambda: search(broken, gallery, 2)):
        with pytest.raises(ValueError, match=r"^2 of 9 query feature rows .* row 2\)"):
            refused()


def test_wrong_shapes_are_an_error() -> None:
    query, labels, gallery, gallery_labels = random_case(1, 4, 9, 3, 2, ties=False)
    for arguments, match in [
        ((query[:0], labels[:0], gallery, gallery_labels), r"got \[0, 3\] and \[9, 3\]"),
        ((query, labels, gallery[:0], gallery_labels[:0]), r"got \[4, 3\] and \[0, 3\]"),
        ((query[0], labels[:1], gallery, gallery_labels), r"got \[3\] and \[9, 3\]"),
        ((query, labels, gallery[:, :2], gallery_labels), r"got \[4, 3\] and \[9, 2\]: encode both with one model"),
        ((query, labels[:3], gallery, gallery_labels), r"4 query and 9 gallery .* got \[3\] and \[9\]"),
        ((query, labels, gallery, gallery_labels[:, None]), r"got \[4\] and \[9, 1\]"),
    ]:
        with pytest.raises(ValueError, match=match):
            retrieval(*arguments)
    for refused, match in ((lambda: retrieval(query, labels, gallery, gallery_labels, k=0), "k must be at least 1; got 0"),
                           (lambda: search(query, gallery, 0), "k must be at least 1; got 0"),
                           (lambda: search(query, gallery[:, :2], 3), r"got \[4, 3\] and \[9, 2\]"),
                           (lambda: search(query, gallery, 3, squared_norms(gallery)[1:]), r"\[9\]; got \[8\]")):
        with pytest.raises(ValueError, match=match):
            refused()


def test_accuracy_of_logits_without_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="the logits hold NaN"):
        zero_shot_accuracy(torch.full((2, 3), torch.nan), torch.tensor([0, 1]), torch.tensor([1]))


def test_accuracies_equal_a_slow_loop() -> None:
    torch.manual_seed(3)
    logits, labels, unseen = torch.randn(60, 6), torch.randint(0, 5, (60,)), [1, 4]
    labels[labels == 2] = 3  # class 2 and class 5 have no image
    logits[torch.arange(60), labels] += 1
    hits: dict[str, dict[int, list[bool]]] = {"zsl": {}, "unseen": {}, "seen": {}}
    for row, y in zip(logits.tolist(), labels.tolist()):
        right = max(range(6), key=row.__getitem__) == y
        hits["unseen" if y in unseen else "seen"].setdefault(y, []).append(right)
        if y in unseen:
            hits["zsl"].setdefault(y, []).append(max(unseen, key=row.__getitem__) == y)
    result = zero_shot_accuracy(logits, labels, unseen)
    for name, classes in hits.items():
        assert result["instance"][name] == pytest.approx(np.mean([hit for one in classes.values() for hit in one]))
        assert result["class"][name] == pytest.approx(np.mean([np.mean(one) for one in classes.values()]))
    assert result["instance"]["seen"] != pytest.approx(result["class"]["seen"])
    for values in result.values():
        assert values["h"] == pytest.approx(2 / (1 / values["unseen"] + 1 / values["seen"]))


def test_accuracies_without_hits_or_images() -> None:
    wrong = zero_shot_accuracy(torch.eye(3)[[1, 0]], torch.tensor([0, 2]), [2])
    assert wrong["class"] == {"zsl": 1.0, "unseen": 0.0, "seen": 0.0, "h": 0.0}
    none = zero_shot_accuracy(torch.eye(3), torch.tensor([0, 1, 0]), [2])
    assert np.isnan(none["instance"]["unseen"]) and np.isnan(none["class"]["h"]) and none["class"]["seen"] == 0.75
